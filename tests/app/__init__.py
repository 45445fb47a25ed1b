"""What an application declares: task types, handlers, settings, the codec, middleware and the lifespan."""
