"""From a manifest row to a conversation and settings: columns, templates, chat forms, a row's own settings.

Knows names and values; fetches nothing, and knows no tokens.
"""
