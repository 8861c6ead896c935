"""The memory of transformer models as a service. Empty, so that importing memstore.v1 costs nothing."""
