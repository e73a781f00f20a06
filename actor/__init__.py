"""The actor: samples trajectories from an engine and streams them to the replay service."""
