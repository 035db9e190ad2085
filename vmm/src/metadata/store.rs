//! The document, and how a part of it is said.

use std::io;

use bedplate_api::vmm::MmdsVersion;
use serde_json::Value;

use super::token::Tokens;

/// The document and how the guest may read it.
pub struct Store {
    data: Value,
    /// Something was put.
    filled: bool,
    limit: usize,
    /// Whether a `GET` needs a token.
    pub version: MmdsVersion,
    /// Plain text, whatever the guest accepts.
    pub imds_compat: bool,
    /// Of version 2.
    pub tokens: Tokens,
}

/// What cannot be done; the words are Firecracker's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum StoreError {
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
    #[error("The MMDS data store is not initialized.")]
    Empty,
    #[error("Resource not found: {0}.")]
    NotFound(String),
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    NoText,
}

/// How a part of the document is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As it is.
    Json,
    /// As EC2's service does: a string without quotes, an object as its keys, one a line, with a slash where there is
    /// more below.
    Imds,
}

impl Store {
    pub(super) fn new(limit: usize) -> io::Result<Self> {
        let (version, tokens) = (MmdsVersion::V1, Tokens::new()?);
        Ok(Self { data: Value::Null, filled: false, limit, version, imds_compat: false, tokens })
    }

    /// All of it; null where nothing was put.
    pub fn data(&self) -> &Value {
        &self.data
    }

    /// Puts `data` in the place of what is there.
    ///
    /// # Errors
    /// It is too large; what is there stays.
    pub fn put(&mut self, data: Value) -> Result<(), StoreError> {
        if data.to_string().len() > self.limit {
            return Err(StoreError::TooLarge);
        }
        (self.data, self.filled) = (data, true);
        Ok(())
    }

    /// Merges `patch` into what is there (RFC 7396).
    ///
    /// # Errors
    /// Nothing is there, or the result is too large; then what is there stays.
    pub fn patch(&mut self, patch: Value) -> Result<(), StoreError> {
        if !self.filled {
            return Err(StoreError::Empty);
        }
        let mut data = self.data.clone();
        merge(&mut data, patch);
        self.put(data)
    }

    /// The part at `path`, whose segments are keys and indices.
    ///
    /// # Errors
    /// There is no such part, or it cannot be said in this format.
    pub fn at(&self, path: &str, format: Format) -> Result<String, StoreError> {
        let mut pointer = path.to_owned();
        while let Some(at) = pointer.find("//") {
            pointer.remove(at);
        }
        let part = self.data.pointer(pointer.strip_suffix('/').unwrap_or(&pointer));
        let part = part.filter(|_| self.filled).ok_or_else(|| StoreError::NotFound(path.to_owned()))?;
        match (format, part) {
            (Format::Json, part) => Ok(part.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(map)) => {
                let line = |(key, value): (&String, &Value)| {
                    if value.is_object() { format!("{key}/") } else { key.clone() }
                };
                Ok(map.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            (Format::Imds, _) => Err(StoreError::NoText),
        }
    }
}

fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(data: Value) -> Store {
        let mut store = Store::new(200).unwrap();
        store.put(data).unwrap();
        store
    }

    #[test]
    fn patches_merge_as_the_rfc_has_it() {
        // The examples of RFC 7396, appendix A.
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut store = store(target);
            store.patch(patch).unwrap();
            assert_eq!(*store.data(), result);
        }
    }

    #[test]
    fn parts_are_said_in_both_formats() {
        let store = store(json!({"latest": {"meta-data": {"id": "i-1", "n": 5}, "list": ["x"]}, "a/b": "slash"}));
        assert_eq!(store.at("/", Format::Imds).unwrap(), "a/b\nlatest/");
        assert_eq!(store.at("/latest/meta-data/", Format::Imds).unwrap(), "id\nn");
        assert_eq!(store.at("//latest///meta-data/id", Format::Imds).unwrap(), "i-1");
        assert_eq!(store.at("/latest/meta-data/id", Format::Json).unwrap(), r#""i-1""#);
        assert_eq!(store.at("/latest/list/0", Format::Imds).unwrap(), "x");
        assert_eq!(store.at("/a~1b", Format::Imds).unwrap(), "slash");
        assert_eq!(store.at("/latest/meta-data/n", Format::Imds), Err(StoreError::NoText));
        assert_eq!(store.at("/latest/meta-data/n", Format::Json).unwrap(), "5");
        assert_eq!(store.at("/late", Format::Json), Err(StoreError::NotFound("/late".into())));
    }

    #[test]
    fn a_store_has_a_limit_and_a_beginning() {
        let mut store = Store::new(20).unwrap();
        assert_eq!(store.patch(json!({"a": 1})), Err(StoreError::Empty));
        assert!(store.at("/", Format::Json).is_err());
        store.put(json!({"a": 1})).unwrap();
        assert_eq!(store.put(json!("x".repeat(30))), Err(StoreError::TooLarge));
        assert_eq!(store.patch(json!({"b": "x".repeat(30)})), Err(StoreError::TooLarge));
        assert_eq!(*store.data(), json!({"a": 1}));
    }
}
