"""The two-stage method: uncertainty, retransmission policies, region search and costs.

- `policy`: metrics, their aggregation, and policies that decide about retransmission.
- `uncertainty`: the metrics of a token from its logits (numpy).
- `roi`: relative attention and the region search (numpy).
- `cost`: bytes, pixels and floating-point operations.
"""
