"""What a memory is worth: models trained, read with memstore's own service, and measured; docs/quality.md."""
