"""An encoded video to RGB frames at chosen times, by PyAV.

    container.py  opens a file, checks its limits, translates FFmpeg's errors
    packets.py    lists a video's frames without decoding any
    stated.py     compares that with what the container states
    timing.py     says which frames are shown
    decoder.py    decodes a frame, from the keyframe before it
    picture.py    makes RGB pixels of it
    frames.py     joins these

Knows containers, codecs and frame times; not where files come from, resizing or patches.
"""
