"""Encoded pictures: their headers, bounded decoding, views and regions.

- `headers`: checks a picture by its header alone; `jpeg`, `png` and `webp` read the formats,
  `container` is what they share.
- `pixels`: Pillow's decoders within bounds.
- `images`: decodes pictures received from a peer, and encodes pictures to send.
- `source_image`: the original at the edge, and the views and regions made from it.
"""
