"""Server side of vlm-collab: engine, backends, service and deployment.

Importing this package loads neither torch nor transformers; the backends do, when opened.
"""
