//! Method, path and body → [`Command`].

use std::fmt::Display;

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use bedplate_api::vmm::{
    Action, Drive, DrivePatch, FileSystem, HintingStart, MachineConfigPatch, NetworkInterface, NetworkInterfacePatch,
    SnapshotLoad, VmStateChange,
};

use super::balloon::BalloonCommand;
use super::commands::Command;
use super::console::ConsoleCommand;
use super::fault::Fault;
use super::hotplug::HotplugCommand;
use super::plug::Unplug;
use super::pmem::PmemCommand;

/// Understands a request; the wording of faults is Firecracker's where clients may look at it.
pub(super) fn parse(method: &Method, path: &str, body: &[u8]) -> Result<Command, Fault> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    match (method.as_str(), segments.as_slice()) {
        ("GET", _) if !body.is_empty() => Err(Fault::bad_request("GET request cannot have a body.")),
        ("GET", []) => Ok(Command::DescribeInstance),
        ("GET", ["version"]) => Ok(Command::DescribeVersion),
        ("GET", ["vm", "config"]) => Ok(Command::DescribeConfig),
        ("GET", ["machine-config"]) => Ok(Command::DescribeMachine),
        ("GET", ["mmds"]) => Ok(Command::DescribeMetadata),
        ("GET", ["balloon"]) => Ok(Command::Balloon(BalloonCommand::Describe)),
        ("GET", ["balloon", "statistics"]) => Ok(Command::Balloon(BalloonCommand::DescribeStatistics)),
        ("GET", ["balloon", "hinting", "status"]) => Ok(Command::Balloon(BalloonCommand::DescribeHinting)),
        ("GET", ["hotplug", "memory"]) => Ok(Command::Hotplug(HotplugCommand::Describe)),
        ("GET", ["bedplate", "status"]) => Ok(Command::DescribeStatus),
        ("GET", ["bedplate", "inspect"]) => Ok(Command::Inspect),
        ("GET", ["bedplate", "vcpus"]) => Ok(Command::DescribeVcpus),

        ("PUT", ["bedplate", "power-button"]) => Ok(Command::PressPowerButton),
        ("PUT", ["bedplate", "stop"]) => Ok(Command::Stop),
        ("PUT", _) if body.is_empty() => Err(Fault::bad_request("Empty PUT request.")),
        ("PUT", ["bedplate", "vcpus"]) => json(body).map(Command::PlugVcpus),
        ("PUT", ["bedplate", "core-dump"]) => json(body).map(Command::DumpCore),
        ("PUT", ["bedplate", "console"]) => json(body).map(ConsoleCommand::Set).map(Command::Console),
        ("PUT", ["bedplate", "filesystems", tag]) => put_file_system(tag, json(body)?),
        ("PUT", ["actions"]) => json(body).map(|action: Action| Command::Act(action.action_type)),
        ("PUT", ["boot-source"]) => json(body).map(Command::SetBootSource),
        ("PUT", ["machine-config"]) => json(body).map(Command::SetMachine),
        ("PUT", ["cpu-config"]) => json(body).map(Command::SetCpu),
        ("PUT", ["drives", id]) => put_drive(id, json(body)?),
        ("PUT", ["network-interfaces", id]) => put_network_interface(id, json(body)?),
        ("PUT", ["pmem", id]) => PmemCommand::Put(json(body)?).of(id).map(Command::Pmem),
        ("PUT", ["mmds"]) => any_json(body).map(Command::PutMetadata),
        ("PUT", ["mmds", "config"]) => json(body).map(Command::SetMmds),
        // Some clients name it, as other devices, and Firecracker does not look at that.
        ("PUT", ["vsock"] | ["vsock", _]) => json(body).map(Command::SetVsock),
        ("PUT", ["entropy"]) => json(body).map(Command::SetEntropy),
        ("PUT", ["balloon"]) => json(body).map(BalloonCommand::Set).map(Command::Balloon),
        ("PUT", ["hotplug", "memory"]) => json(body).map(HotplugCommand::Set).map(Command::Hotplug),
        ("PUT", ["serial"]) => json(body).map(Command::SetSerial),
        ("PUT", ["logger"]) => json(body).map(Command::SetLogger),
        ("PUT", ["metrics"]) => json(body).map(Command::SetMetrics),
        ("PUT", ["snapshot", "create"]) => json(body).map(Command::CreateSnapshot),
        ("PUT", ["snapshot", "load"]) => load_snapshot(json(body)?),

        ("PATCH", ["balloon", "hinting", "start"]) => start_hinting(body).map(Command::Balloon),
        ("PATCH", ["balloon", "hinting", "stop"]) => Ok(Command::Balloon(BalloonCommand::StopHinting)),
        ("PATCH", _) if body.is_empty() => Err(Fault::bad_request("Empty PATCH request.")),
        ("PATCH", ["bedplate", "console"]) => json(body).map(ConsoleCommand::Resize).map(Command::Console),
        ("PATCH", ["machine-config"]) => patch_machine(json(body)?),
        ("PATCH", ["drives", id]) => patch_drive(id, json(body)?),
        ("PATCH", ["network-interfaces", id]) => patch_network_interface(id, json(body)?),
        ("PATCH", ["pmem", id]) => PmemCommand::Patch(json(body)?).of(id).map(Command::Pmem),
        ("PATCH", ["mmds"]) => any_json(body).map(Command::PatchMetadata),
        ("PATCH", ["vm"]) => json(body).map(|change: VmStateChange| Command::ChangeState(change.state)),
        ("PATCH", ["balloon"]) => json(body).map(BalloonCommand::Update).map(Command::Balloon),
        ("PATCH", ["balloon", "statistics"]) => json(body).map(BalloonCommand::UpdateStatistics).map(Command::Balloon),
        ("PATCH", ["hotplug", "memory"]) => json(body).map(HotplugCommand::Update).map(Command::Hotplug),

        ("DELETE", _) if !body.is_empty() => Err(Fault::bad_request("DELETE request cannot have a body.")),
        ("DELETE", ["drives", id]) => Ok(Command::Unplug(Unplug::Drive((*id).into()))),
        ("DELETE", ["network-interfaces", id]) => Ok(Command::Unplug(Unplug::NetworkInterface((*id).into()))),
        ("DELETE", ["pmem", id]) => Ok(Command::Unplug(Unplug::Pmem((*id).into()))),

        (_, ["drives" | "network-interfaces" | "pmem"]) => Err(Fault::bad_request("The ID cannot be empty.")),
        _ => Err(Fault::bad_request(format!("Invalid request method and/or path: {method} {path}."))),
    }
}

fn json<T: DeserializeOwned + Serialize>(body: &[u8]) -> Result<T, Fault> {
    crate::json::object(body).map_err(not_understood)
}

fn any_json(body: &[u8]) -> Result<Value, Fault> {
    serde_json::from_slice(body).map_err(not_understood)
}

fn not_understood(error: impl Display) -> Fault {
    Fault::bad_request(format!("An error occurred when deserializing the json body of a request: {error}."))
}

fn put_drive(id: &str, drive: Drive) -> Result<Command, Fault> {
    same_id(id, &drive.drive_id)?;
    Ok(Command::PutDrive(drive))
}

fn patch_drive(id: &str, patch: DrivePatch) -> Result<Command, Fault> {
    same_id(id, &patch.drive_id)?;
    Ok(Command::PatchDrive(patch))
}

fn put_network_interface(id: &str, interface: NetworkInterface) -> Result<Command, Fault> {
    same_id(id, &interface.iface_id)?;
    Ok(Command::PutNetworkInterface(interface))
}

fn put_file_system(tag: &str, file_system: FileSystem) -> Result<Command, Fault> {
    same_id(tag, &file_system.tag)?;
    Ok(Command::PutFileSystem(file_system))
}

fn patch_network_interface(id: &str, patch: NetworkInterfacePatch) -> Result<Command, Fault> {
    same_id(id, &patch.iface_id)?;
    Ok(Command::PatchNetworkInterface(patch))
}

fn patch_machine(patch: MachineConfigPatch) -> Result<Command, Fault> {
    if patch == MachineConfigPatch::default() {
        return Err(Fault::bad_request("Empty PATCH request."));
    }
    Ok(Command::PatchMachine(patch))
}

/// The one request whose body may be missing.
fn start_hinting(body: &[u8]) -> Result<BalloonCommand, Fault> {
    let start = if body.is_empty() { HintingStart::default() } else { json(body)? };
    Ok(BalloonCommand::StartHinting(start))
}

fn load_snapshot(load: SnapshotLoad) -> Result<Command, Fault> {
    match (&load.mem_backend, &load.mem_file_path) {
        (None, None) => Err(not_understood("missing field: either `mem_backend` or `mem_file_path` is required")),
        (Some(_), Some(_)) => {
            Err(not_understood("too many fields: either `mem_backend` or `mem_file_path` exclusively is required"))
        }
        _ => Ok(Command::LoadSnapshot(load)),
    }
}

fn same_id(in_path: &str, in_body: &str) -> Result<(), Fault> {
    if in_path == in_body {
        return Ok(());
    }
    let message = format!("The id from the path [{in_path}] does not match the id from the body [{in_body}]!");
    Err(Fault::bad_request(message))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bedplate_api::vmm::BalloonUpdate;
    use serde::de::{Error, Visitor};
    use serde::{Deserialize, Deserializer, forward_to_deserialize_any};

    use super::*;

    fn parse(method: &str, path: &str, body: &str) -> Result<Command, String> {
        super::parse(&method.parse().unwrap(), path, body.as_bytes()).map_err(|fault| fault.message)
    }

    #[test]
    fn requests_are_understood() {
        assert_eq!(parse("GET", "/", ""), Ok(Command::DescribeInstance));
        assert_eq!(parse("PUT", "/bedplate/stop", ""), Ok(Command::Stop));
        let drive = r#"{"drive_id": "a", "path_on_host": "p", "is_root_device": false}"#;
        assert!(matches!(parse("PUT", "/drives/a", drive), Ok(Command::PutDrive(_))));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        let drive = r#"{"drive_id": "a", "path_on_host": "p", "is_root_device": false}"#;
        assert!(parse("PUT", "/drives/b", drive).unwrap_err().contains("does not match"));
        assert!(parse("PUT", "/drives/a", "{").unwrap_err().contains("deserializing the json body"));
        assert!(parse("PUT", "/drives/a", &drive.replace("path_on", "path_of")).unwrap_err().contains("path_of_host"));
        assert!(parse("PUT", "/boot-source", r#"["k"]"#).unwrap_err().contains("an array where"));
        assert!(parse("POST", "/drives/a", "").unwrap_err().contains("Invalid request method"));
        assert!(parse("GET", "/nowhere", "").unwrap_err().contains("Invalid request method"));
        assert!(parse("PUT", "/drives", drive).unwrap_err().contains("ID cannot be empty"));
        assert_eq!(parse("PUT", "/logger", "").unwrap_err(), "Empty PUT request.");
        assert_eq!(parse("PATCH", "/vm", "").unwrap_err(), "Empty PATCH request.");
        assert_eq!(parse("PATCH", "/machine-config", "{}").unwrap_err(), "Empty PATCH request.");
        let load = |more: &str| parse("PUT", "/snapshot/load", &format!(r#"{{"snapshot_path": "s" {more}}}"#));
        assert!(load("").unwrap_err().contains("either `mem_backend` or `mem_file_path` is required"));
        let backend = r#", "mem_backend": {"backend_type": "File", "backend_path": "m"}, "huge_pages": "2M""#;
        assert!(load(&format!(r#"{backend}, "mem_file_path": "m""#)).unwrap_err().contains("too many fields"));
        assert!(matches!(load(backend), Ok(Command::LoadSnapshot(_))));
        assert!(parse("PUT", "/cpu-config", r#"{"reg_modifiers": []}"#).unwrap_err().contains("reg_modifiers"));
        assert!(parse("GET", "/version", "{}").unwrap_err().contains("cannot have a body"));
        assert!(parse("PUT", "/actions", r#"{"action_type": "Explode"}"#).unwrap_err().contains("Explode"));
    }

    #[test]
    fn paths_of_the_balloon_are_firecracker_s() {
        let body = r#"{"amount_mib": 5}"#;
        let update = BalloonCommand::Update(BalloonUpdate { amount_mib: 5 });
        assert_eq!(parse("PATCH", "/balloon", body), Ok(Command::Balloon(update)));
        assert!(parse("PUT", "/balloon", body).unwrap_err().contains("deflate_on_oom"), "it has no default");
        let start = || Ok(Command::Balloon(BalloonCommand::StartHinting(HintingStart { acknowledge_on_stop: true })));
        assert_eq!(parse("PATCH", "/balloon/hinting/start", ""), start());
        assert_eq!(parse("PATCH", "/balloon/hinting/start", "{}"), start());
        assert!(parse("PUT", "/balloon/hinting/start", "{}").unwrap_err().contains("Invalid request method"));
        assert!(parse("GET", "/balloon/nothing", "").unwrap_err().contains("Invalid request method"));
    }

    /// Method and path of each arm of `parse`, as the source has them.
    fn routed() -> BTreeSet<(String, String)> {
        let arms = include_str!("routes.rs").lines().map(str::trim).take_while(|line| *line != "#[cfg(test)]");
        let arm = |line: &str| {
            let (method, rest) = line.strip_prefix("(\"")?.split_once("\", [")?;
            let (segments, _) = rest.split_once(']')?;
            let name = |segment: &str| {
                format!("/{}", if segment.starts_with('"') { segment.trim_matches('"') } else { "{id}" })
            };
            let path: String = segments.split(", ").filter(|segment| !segment.is_empty()).map(name).collect();
            Some((method.to_owned(), if path.is_empty() { "/".to_owned() } else { path }))
        };
        arms.filter_map(arm).collect()
    }

    fn document() -> Value {
        serde_yaml_ng::from_str(include_str!("../../../docs/openapi-vmm.yaml")).unwrap()
    }

    fn operations(document: &Value) -> impl Iterator<Item = (String, String, &Value)> {
        let paths = document["paths"].as_object().unwrap().iter();
        let methods = |(path, item): (&String, &'_ Value)| {
            let operations = item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters");
            operations.map(|(method, _)| (method.to_uppercase(), path.clone())).collect::<Vec<_>>()
        };
        let all: Vec<_> = paths.flat_map(methods).collect();
        all.into_iter().map(|(method, path)| {
            let operation = &document["paths"][path.as_str()][method.to_lowercase()];
            (method, path, operation)
        })
    }

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let document = document();
        let documented: BTreeSet<_> = operations(&document).map(|(method, path, _)| (method, path)).collect();
        assert_eq!(documented, routed());
        assert!(documented.len() > 25, "{documented:?}");
    }

    #[test]
    fn the_document_has_every_field_and_no_other() {
        let document = document();
        let properties = |schema: &str| -> BTreeSet<String> {
            document["components"]["schemas"][schema]["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, _)| name.clone())
                .collect()
        };
        // An unknown field is answered with the list of those that are known.
        let known = |message: &str| -> BTreeSet<String> {
            message.split('`').skip(1).step_by(2).filter(|name| *name != "none").map(str::to_owned).collect()
        };
        for (method, path, operation) in operations(&document) {
            let reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str();
            let Some(schema) = reference.map(|reference| reference.rsplit('/').next().unwrap()) else { continue };
            if schema != "Metadata" {
                let message = parse(&method, &path, r#"{"none": 0}"#).unwrap_err();
                assert_eq!(known(&message), properties(schema), "{method} {path}: {message}");
            }
        }
        // Unknown sections of a configuration file are no error: its fields are those that it asks for.
        let fields = bedplate_api::vmm::VmConfig::deserialize(Fields).unwrap_err().to_string();
        assert_eq!(fields.split(' ').map(str::to_owned).collect::<BTreeSet<_>>(), properties("VmConfig"));
    }

    /// Fails with the names of a struct's fields.
    struct Fields;

    impl<'de> Deserializer<'de> for Fields {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("no struct"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom(fields.join(" ")))
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
}
