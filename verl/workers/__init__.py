"""Ray-facing roles, each composed from the layers below."""
