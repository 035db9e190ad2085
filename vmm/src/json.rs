//! Reading what clients send.

use std::fmt;

use serde::de::{DeserializeOwned, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

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

/// As [`object`]; but what is `null` at the top is left out, whatever its name, because that asks for nothing. Clients of
/// Firecracker write names that Firecracker does not look at.
///
/// # Errors
/// As [`object`]: a name with something behind it is refused.
pub fn sections<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<T> {
    object(text).or_else(|error| {
        let Ok(Sections(sections)) = serde_json::from_slice(text) else { return Err(error) };
        let sections = sections.iter().filter(|(_, section)| section.get() != "null");
        let sections: Vec<_> = sections.map(|(name, section)| format!("{}:{section}", json!(name))).collect();
        // The first error knows its place in the text.
        object(format!("{{{}}}", sections.join(",")).as_bytes()).map_err(|_| error)
    })
}

/// An object's fields, in their own words: those that are there twice are there twice.
struct Sections<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Sections<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Sections<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Sections<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Sections(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
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
        let twice = r#"{"none": null, "drives": [], "drives": []}"#;
        let within = r#"{"none": null, "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "vcpu_count": 2}}"#;
        assert!(read(twice).is_err() && read(within).is_err());
        assert!(read(&within.replace(r#", "vcpu_count": 2"#, "")).is_ok());
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
