//! Benches of Koya: the measurements are in `benches/benches` and `benches/src/bin`. Here are the common parts: medians, and
//! rows of figures compared with those of peers.

pub mod cost;
pub mod counts;
pub mod process_memory;
pub mod tiny;

use serde_json::{Map, Value, json};

/// As in the measured programs.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// The median; of an even number of values the higher of the two middle ones.
///
/// # Panics
/// If there are no values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Rounds to three decimal places.
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A row: Koya's figure, and that of each peer. A ratio above 1 always means that Koya is better.
pub fn row(
    name: &str,
    unit: &str,
    less_is_better: bool,
    koya: f64,
    peers: impl IntoIterator<Item = (String, f64)>,
) -> Value {
    let (mut beside, mut ratios) = (Map::new(), Map::new());
    for (peer, value) in peers {
        let better = match less_is_better {
            true => value / koya,
            false => koya / value,
        };
        beside.insert(peer.clone(), json!(round(value)));
        ratios.insert(peer, json!(round(better)));
    }
    json!({"name": name, "unit": unit, "koya": round(koya), "peers": beside, "ratio": ratios})
}

/// Prints rows for `cargo xtask`, with a prefix by which they are found in a console, and as a table.
///
/// # Errors
/// If a row can't be written as JSON, which does not happen.
pub fn print_marked(rows: &[Value]) -> serde_json::Result<()> {
    print_table(rows);
    println!("rows: {}", serde_json::to_string(rows)?);
    Ok(())
}

/// Prints rows on standard error, each peer's figure with its ratio.
pub fn print_table(rows: &[Value]) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    eprintln!("{:<46} {:>12} {:>11}  peers (ratio)", "", "unit", "koya");
    for row in rows {
        let peers = row["peers"].as_object().into_iter().flatten();
        let peers = peers.map(|(peer, value)| {
            let ratio = number(&row["ratio"][peer]);
            format!("{peer} {:.2} ({ratio:.2})", number(value))
        });
        eprintln!(
            "{:<46} {:>12} {:>11.2}  {}",
            text(&row["name"]),
            text(&row["unit"]),
            number(&row["koya"]),
            peers.collect::<Vec<_>>().join(", "),
        );
    }
}
