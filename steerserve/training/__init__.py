"""Training SAEs on harvested activations: shards in, a folder that steerserve and SAELens both load out."""
