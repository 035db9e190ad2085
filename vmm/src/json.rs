//! Reading what clients send.

use serde::Serialize;
use serde::de::{DeserializeOwned, Error};
use serde_json::{Map, Value};

/// What an object describes. An array in the place of an object is refused, at the top and within: serde would take it
/// for a struct, field after field.
///
/// # Errors
/// It is not JSON, not an object, or another object.
pub fn object<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<T> {
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(Error::custom("an array where an object is expected"));
    }
    let value = serde_json::from_slice(text)?;
    // Arrays are there to be found only if there is a bracket at all.
    if text.contains(&b'[') {
        same_form(&serde_json::from_slice(text)?, &serde_json::to_value(&value)?, "")?;
    }
    Ok(value)
}

/// As [`object`]; but a name that it does not know is left out where it is `null` at the top, because that asks for nothing.
/// Clients of Firecracker write such names, which Firecracker does not look at.
///
/// # Errors
/// As [`object`]: a name with something behind it is refused.
pub fn sections<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<T> {
    object(text).or_else(|error| {
        let Ok(mut sections) = serde_json::from_slice::<Map<String, Value>>(text) else { return Err(error) };
        sections.retain(|_, section| !section.is_null());
        // The first error knows its place in the text.
        object(&serde_json::to_vec(&sections)?).map_err(|_| error)
    })
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
    fn an_unknown_section_without_anything_in_it_is_nobodys_loss() {
        let read = |text: &str| sections::<VmConfig>(text.as_bytes()).map_err(|error| error.to_string());
        assert_eq!(read(r#"{"vsock_device": null, "vsock": null}"#), Ok(VmConfig::default()));
        assert!(read(r#"{"vsock_device": null, "vsock_device2": {}}"#).unwrap_err().contains("at line 1"));
        assert!(read(r#"{"machine-config": {"none": null}}"#).is_err());
        assert!(read("[]").is_err());
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
