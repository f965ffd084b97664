"""Ask a server about a photo from Python.

vlm-collab serve &
python examples/ask.py photo.jpg "what number is on the red circle?" "how many signs are there?"
"""

import argparse

from edge_client import Client, Picture
from vlm_collab.errors import CollabError

parser = argparse.ArgumentParser()
parser.add_argument("photo")
parser.add_argument("questions", nargs="+")
parser.add_argument("--server", default="ws://127.0.0.1:8765")
given = parser.parse_args()

# One connection for all questions. The server keeps the view, so only the first question sends it.
with Client(given.server) as client:
    photo = Picture.open(given.photo)
    for question in given.questions:
        try:
            answer = client.ask(photo, question)
        except CollabError as error:  # one clear line, as the command line prints it
            raise SystemExit(str(error)) from None
        print(f"{question} {answer.text}")
        if answer.refined:
            print(f"  looked again at {answer.box}; the first answer was {answer.first_text!r}")
        elif answer.fallback.name != "NONE":
            print(f"  the first answer, because of {answer.fallback.name}")
        print(f"  {answer.bytes_up} bytes sent instead of {answer.original_bytes}")
