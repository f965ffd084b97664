"""The protocol `vlm-collab/1`, sans I/O: messages and the state machines of both ends.

- `messages`: the messages. `encoding`: their encoder and decoder.
- `table`: the states of a question and the transitions between them.
- `session`: what both ends share; `edge_session` and `server_session` are the two ends.
- `image_positions`: positions of pictures in the texts of a conversation.
"""
