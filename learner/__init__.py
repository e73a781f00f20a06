"""The learner: samples stale data, corrects for its age, steps the policy."""
