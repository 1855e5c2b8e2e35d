//! Sizes as users write them.

/// Parses a size into its number and its unit in lower case: `512m`, `2GiB` and `2gb` have `m` and `g`, `1024` has none.
/// `None` if it does not begin with a number.
pub fn parse_size(text: &str) -> Option<(u64, String)> {
    let lower = text.to_lowercase();
    let end = lower
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let unit = unit.trim_end_matches("ib").trim_end_matches('b');
    Some((number.parse().ok()?, unit.to_owned()))
}

/// The binary logarithm of the bytes in a unit of [`parse_size`]; `None` if there is no such unit.
pub fn unit_shift(unit: &str) -> Option<u32> {
    Some(match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    })
}
