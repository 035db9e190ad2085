//! Reading what clients send.

use serde::de::{DeserializeOwned, Error};

/// What an object describes. An array is refused: serde would take it for a struct, field after field.
///
/// # Errors
/// It is not JSON, not an object, or another object.
pub fn object<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(Error::custom("an array where an object is expected"));
    }
    serde_json::from_slice(text)
}

#[cfg(test)]
mod tests {
    use bedplate_api::vmm::VmConfig;

    use super::*;

    #[test]
    fn an_array_is_no_configuration() {
        for text in [&b"[]"[..], b"\n []", b"[{}]"] {
            assert!(object::<VmConfig>(text).unwrap_err().to_string().contains("an array"));
        }
        assert!(object::<VmConfig>(b"7").is_err());
        object::<VmConfig>(b" {}").unwrap();
    }
}
