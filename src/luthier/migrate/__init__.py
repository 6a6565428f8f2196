"""Import from OpenAI.

An import converts files, without a model and without a network. Everything that cannot be imported
is listed with a reason, in the result and in ``IMPORT.md`` of the new folder.
"""
