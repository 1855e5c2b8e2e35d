//! Benches of Koya; see `benches/benches` for what is measured.
