"""The published estimators of FARMS and AlphaPruning."""
