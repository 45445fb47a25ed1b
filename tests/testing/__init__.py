"""The testing kit, notifyq.testing."""
