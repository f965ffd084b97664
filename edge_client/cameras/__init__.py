"""Sources of pictures: a file, a folder that receives pictures, a webcam, a stream, a recording.

::

    with open_camera("rtsp://192.168.1.7/stream") as camera:
        frame = camera.take(wait_s=5)
        answer = edge_client.ask(frame.picture, "is the gate open?")

Every source returns its newest good picture on request; it keeps no queue of old ones. Webcams,
streams and recordings need the `camera` extra (PyAV); files, folders and pictures on a web server
do not.
"""

from __future__ import annotations

from edge_client.cameras.base import Camera as Camera
from edge_client.cameras.base import CameraError as CameraError
from edge_client.cameras.base import CameraFrame as CameraFrame
from edge_client.cameras.open import open_camera as open_camera

__all__ = ["Camera", "CameraError", "CameraFrame", "open_camera"]
