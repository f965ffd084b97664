"""The method itself: uncertainty, policies, regions and costs."""
