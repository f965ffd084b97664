"""The official OpenAI SDK as the edge: a small view goes up, and a crop only when it is needed.

vlm-collab serve &
python examples/openai_edge.py demo/vlm_collab_demo/pictures/scene-2.jpg \\
    "what number is on the white diamond?"
"""

import base64
import io
import json
import os
import sys

from openai import OpenAI
from PIL import Image, ImageOps

TOOL = {"type": "function", "name": "request_region", "parameters": {}, "strict": False}


def image_part(picture: Image.Image) -> dict[str, str]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "input_image", "image_url": url}


client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8765/v1"),
    api_key=os.environ.get("VLM_COLLAB_TOKEN", "none"),
)
path, question = sys.argv[1:]
photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
model = client.models.list().data[0]
view = photo.resize((model.vlm_collab["view_width"], model.vlm_collab["view_height"]))
content = [{"type": "input_text", "text": question}, image_part(view)]
answer = client.responses.create(
    model=model.id,
    tools=[TOOL],
    input=[{"role": "user", "content": content}],
    extra_body={"vlm_collab": {"sources": [photo.size]}},  # what the view shows, in pixels
)
call = answer.output[0]
if call.type == "function_call":  # the model is unsure, and says where it needs to look
    where = json.loads(call.arguments)  # in shares of the picture
    left, top = where["left"] * photo.width, where["top"] * photo.height
    right, bottom = left + where["width"] * photo.width, top + where["height"] * photo.height
    crop = photo.crop((round(left), round(top), round(right), round(bottom)))
    crop.thumbnail((where["target_width"], where["target_height"]))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": [image_part(crop)]}
    answer = client.responses.create(
        model=model.id, tools=[TOOL], previous_response_id=answer.id, input=[output]
    )
details = answer.vlm_collab
print(f"{answer.output_text} (first answer: {details['first_text']})")
print(f"{details['bytes_up']} bytes sent instead of {os.path.getsize(path) * 4 // 3}")
