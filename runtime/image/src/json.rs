//! JSON as parsed by Go's `encoding/json`, since images are written and read by Go programs: names of fields match in any
//! case, null changes nothing, the last of several equal fields counts, and invalid UTF-8 becomes U+FFFD.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde_json::{Error, Value};

/// Reads a document.
///
/// # Errors
/// If it is not JSON, or not a `T`.
pub(crate) fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    // Some Windows programs write a byte order mark.
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let text = String::from_utf8_lossy(text);
    let value = serde_json::from_str(&with_whole_surrogates(&text))?;
    T::deserialize(AsGo(value))
}

/// Unpaired surrogates (`\ud83d`) become `\ufffd`.
fn with_whole_surrogates(text: &str) -> String {
    const HIGH: std::ops::Range<u32> = 0xd800..0xdc00;
    const LOW: std::ops::Range<u32> = 0xdc00..0xe000;
    let unit = |at: usize| -> Option<u32> {
        let digits = text.get(at..)?.strip_prefix("\\u")?.get(..4)?;
        u32::from_str_radix(digits, 16).ok()
    };
    let mut whole = String::with_capacity(text.len());
    let mut at = 0;
    while let Some(found) = text[at..].find('\\') {
        whole.push_str(&text[at..at + found]);
        at += found;
        let (taken, replaced) = match unit(at) {
            Some(high) if HIGH.contains(&high) => match unit(at + 6) {
                Some(low) if LOW.contains(&low) => (12, false),
                _ => (6, true),
            },
            Some(low) if LOW.contains(&low) => (6, true),
            Some(_) => (6, false),
            // Another escape: its next character is skipped, even if it is a backslash.
            None => (
                1 + text[at + 1..].chars().next().map_or(0, char::len_utf8),
                false,
            ),
        };
        match replaced {
            true => whole.push_str("\\ufffd"),
            false => whole.push_str(&text[at..at + taken]),
        }
        at += taken;
    }
    whole.push_str(&text[at..]);
    whole
}

/// A value, deserialized by these rules.
struct AsGo(Value);

impl IntoDeserializer<'_, Error> for AsGo {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Deserializes null as the zero value of these types.
macro_rules! zero_for_null {
    ($($method:ident => $visit:ident($zero:expr)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.0 {
                Value::Null => visitor.$visit($zero),
                _ => self.deserialize_any(visitor),
            }
        })*
    };
}

impl<'de> Deserializer<'de> for AsGo {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(values) => {
                let mut values = SeqDeserializer::new(values.into_iter().map(AsGo));
                let result = visitor.visit_seq(&mut values)?;
                values.end().map(|()| result)
            }
            Value::Object(members) => {
                let members = members.into_iter().map(|(name, value)| (name, AsGo(value)));
                let mut members = MapDeserializer::new(members);
                let result = visitor.visit_map(&mut members)?;
                members.end().map(|()| result)
            }
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let members = match self.0 {
            Value::Object(members) => members,
            Value::Null => serde_json::Map::new(),
            other => return AsGo(other).deserialize_any(visitor),
        };
        let mut known = serde_json::Map::new();
        // A field with the exact name takes precedence.
        let (exact, folded): (Vec<_>, Vec<_>) = members
            .into_iter()
            .partition(|(name, _)| fields.contains(&name.as_str()));
        for (name, value) in folded {
            let field = fields
                .iter()
                .find(|field| field.eq_ignore_ascii_case(&name));
            if let Some(field) = field {
                known.insert((*field).to_owned(), value);
            }
        }
        known.extend(exact);
        AsGo(Value::Object(known)).deserialize_any(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => AsGo(Value::Array(Vec::new())).deserialize_any(visitor),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => AsGo(Value::Object(serde_json::Map::new())).deserialize_any(visitor),
            _ => self.deserialize_any(visitor),
        }
    }

    zero_for_null! {
        deserialize_bool => visit_bool(false),
        deserialize_u32 => visit_u64(0),
        deserialize_u64 => visit_u64(0),
        deserialize_i64 => visit_i64(0),
        deserialize_str => visit_str(""),
        deserialize_string => visit_str(""),
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 u8 u16 f32 f64 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct enum identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, Default, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Inner {
        cmd: Vec<String>,
        labels: BTreeMap<String, String>,
        size: u64,
    }

    #[derive(Debug, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outer {
        media_type: String,
        inner: Option<Inner>,
    }

    fn read(text: impl AsRef<[u8]>) -> Outer {
        from_slice(text.as_ref()).unwrap()
    }

    #[test]
    fn names_of_members_match_in_any_case() {
        let outer = read(
            r#"{"MEDIATYPE": "a", "Inner": {"cmd": ["x"], "labels": {"A": "1", "a": "2"}, "other": 1}}"#,
        );
        let inner = outer.inner.unwrap();
        assert_eq!(
            (outer.media_type.as_str(), &inner.cmd[..]),
            ("a", &["x".to_owned()][..])
        );
        // Keys of a map are case-sensitive.
        assert_eq!(inner.labels.len(), 2);
        assert_eq!(
            read(r#"{"mediatype": "other", "mediaType": "its own"}"#).media_type,
            "its own"
        );
    }

    #[test]
    fn null_changes_nothing_and_the_last_member_counts() {
        let outer = read(
            r#"{"mediaType": null, "inner": {"Cmd": null, "Labels": {"k": null}, "Size": null}}"#,
        );
        let inner = outer.inner.unwrap();
        assert_eq!((outer.media_type.as_str(), inner.size), ("", 0));
        assert_eq!(inner.labels["k"], "");
        assert_eq!(read(r#"{"mediaType": "a", "inner": null}"#).inner, None);
        assert_eq!(
            read(r#"{"mediaType": "a", "mediaType": "b"}"#).media_type,
            "b"
        );
        assert!(from_slice::<Outer>(br#"{"mediaType": 1}"#).is_err());
    }

    #[test]
    fn text_that_is_no_unicode_is_replaced() {
        let media_type =
            |bytes: &[u8]| read([b"{\"mediaType\": \"", bytes, b"\"}"].concat()).media_type;
        assert_eq!(media_type(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(media_type(br"\ud83d!"), "\u{fffd}!");
        assert_eq!(media_type(br"\udc00\ud83d\ude00"), "\u{fffd}\u{1f600}");
        assert_eq!(media_type(br"\\ud83d \u0041\n"), "\\ud83d A\n");
        assert_eq!(media_type(br"\ud83d\u0041"), "\u{fffd}A");
        for broken in [
            &b"{\"mediaType\": \"\\"[..],
            b"{\"mediaType\": \"\\u12",
            b"\\",
            "\\é".as_bytes(),
        ] {
            assert!(from_slice::<Outer>(broken).is_err());
        }
    }
}
