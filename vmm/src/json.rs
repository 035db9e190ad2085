//! Reading what clients send.

use serde::Serialize;
use serde::de::{DeserializeOwned, Error};
use serde_json::Value;

/// What an object describes. An array in the place of an object is refused, at the top and within: serde would take it
/// for a struct, field after field.
///
/// # Errors
/// It is not JSON, not an object, or another object.
pub fn object<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<T> {
    read(text, || serde_json::from_slice(text))
}

/// What `parse` makes of `text`, if that has the form of an object.
fn read<T: Serialize>(text: &[u8], parse: impl FnOnce() -> serde_json::Result<T>) -> serde_json::Result<T> {
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(Error::custom("an array where an object is expected"));
    }
    let value = parse()?;
    // Arrays are there to be found only if there is a bracket at all.
    if text.contains(&b'[') {
        same_form(&serde_json::from_slice(text)?, &serde_json::to_value(&value)?, "")?;
    }
    Ok(value)
}

/// As [`object`], for one whose unknown fields are nobody's: beside it their names. At the top only, and without those that
/// are `null`, which ask for nothing.
///
/// # Errors
/// As [`object`].
pub fn sections<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<(T, Vec<String>)> {
    let mut unknown = Vec::new();
    let value = read(text, || {
        let mut parser = serde_json::Deserializer::from_slice(text);
        // Nothing else is ignored: what a section describes has no unknown fields.
        let value = serde_ignored::deserialize(&mut parser, |name| unknown.push(name.to_string()))?;
        parser.end()?;
        Ok(value)
    })?;
    if !unknown.is_empty() {
        let sent: Value = serde_json::from_slice(text)?;
        unknown.retain(|name| !sent[name].is_null());
    }
    Ok((value, unknown))
}

/// Compares what was sent with how it would be written.
fn same_form(sent: &Value, understood: &Value, place: &str) -> serde_json::Result<()> {
    match (sent, understood) {
        (Value::Array(_), Value::Object(_)) => {
            Err(Error::custom(format!("{place} is an array where an object is expected")))
        }
        (Value::Array(sent), Value::Array(understood)) => {
            sent.iter().zip(understood).try_for_each(|(sent, understood)| same_form(sent, understood, place))
        }
        (Value::Object(sent), Value::Object(understood)) => {
            let both = sent.iter().filter_map(|(name, sent)| Some((name, sent, understood.get(name)?)));
            both.into_iter().try_for_each(|(name, sent, understood)| same_form(sent, understood, name))
        }
        _ => Ok(()),
    }
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

    #[test]
    fn an_unknown_section_is_named_and_nothing_within_one_is_unknown() {
        let unknown = |text: &str| sections::<VmConfig>(text.as_bytes()).map(|(_, unknown)| unknown);
        assert_eq!(unknown(r#"{"vsock_device": null, "vsock": null}"#).unwrap(), [""; 0]);
        assert_eq!(
            unknown(r#"{"drive": [{}], "drives": [], "vsock_device": {"a": 1}}"#).unwrap(),
            ["drive", "vsock_device"]
        );
        for refused in [
            "[]",
            "{} {}",
            r#"{"none": 1, "boot-source": ["k"]}"#,
            r#"{"machine-config": {"none": null}}"#,
            r#"{"none": 1, "drives": [], "drives": []}"#,
            r#"{"none": 1, "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "vcpu_count": 2}}"#,
        ] {
            assert!(unknown(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn nor_is_an_array_within_one() {
        let error = |text: &str| object::<VmConfig>(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(error(r#"{"boot-source": ["k"]}"#), "boot-source is an array where an object is expected");
        assert_eq!(error(r#"{"drives": [["d", "p", false]]}"#), "drives is an array where an object is expected");
        let drive = r#"{"drives": [{"drive_id": "d", "path_on_host": "p", "is_root_device": false}]}"#;
        assert_eq!(object::<VmConfig>(drive.as_bytes()).unwrap().drives.len(), 1);
    }
}
