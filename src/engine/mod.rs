//! A loaded model and its timelines: the only interface that the front ends see.
