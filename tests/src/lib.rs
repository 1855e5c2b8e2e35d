//! Whole-system tests; everything is under `tests/tests`.
//!
//! - `house`: the rules of the repository itself
//! - `system`: Linux guests, in the rig or on hardware KVM
