"""Decoding in a process that may hang, crash or outgrow its memory without harm to the actor.

    actor  --Popen-->  fork server  --fork-->  decoder
    client.py          fork_server.py          decoder.py
    process.py         imports codecs, waits   decodes rows
                                               with protocol.py and shared_memory.py between client and decoder

Knows processes, deadlines, memory and shared memory; not codecs, which live in the folder above.
"""
