"""Nothing but the registration of torch.ops.farms_fast on import."""
