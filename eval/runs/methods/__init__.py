"""The methods that a run can measure, behind one interface."""
