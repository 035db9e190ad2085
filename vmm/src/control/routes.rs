//! Method, path and body → [`Command`].

use hyper::Method;
use serde::de::DeserializeOwned;

use bedplate_api::vmm::{Action, Drive, NetworkInterface, VmStateChange};

use super::balloon;
use super::commands::Command;
use super::fault::Fault;
use super::hotplug;

/// Understands a request; the wording of faults is Firecracker's where clients may look at it.
pub(super) fn parse(method: &Method, path: &str, body: &[u8]) -> Result<Command, Fault> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let unknown = || Err(Fault::bad_request(format!("Invalid request method and/or path: {method} {path}.")));
    match (method.as_str(), segments.as_slice()) {
        ("GET", _) if !body.is_empty() => Err(Fault::bad_request("GET request cannot have a body.")),
        ("GET", []) => Ok(Command::DescribeInstance),
        ("GET", ["version"]) => Ok(Command::DescribeVersion),
        ("GET", ["vm", "config"]) => Ok(Command::DescribeConfig),
        ("GET", ["machine-config"]) => Ok(Command::DescribeMachine),
        ("GET", ["bedplate", "status"]) => Ok(Command::DescribeStatus),
        ("PUT", ["boot-source"]) => json(body).map(Command::SetBootSource),
        ("PUT", ["machine-config"]) => json(body).map(Command::SetMachine),
        ("PATCH", ["machine-config"]) => json(body).map(Command::PatchMachine),
        ("PUT", ["drives", id]) => {
            let drive: Drive = json(body)?;
            same_id(id, &drive.drive_id)?;
            Ok(Command::PutDrive(drive))
        }
        ("PUT", ["network-interfaces", id]) => {
            let interface: NetworkInterface = json(body)?;
            same_id(id, &interface.iface_id)?;
            Ok(Command::PutNetworkInterface(interface))
        }
        ("PUT", ["vsock"]) => json(body).map(Command::SetVsock),
        ("PUT", ["entropy"]) => json(body).map(Command::SetEntropy),
        ("PUT", ["serial"]) => json(body).map(Command::SetSerial),
        ("PUT", ["logger"]) => json(body).map(Command::SetLogger),
        ("PUT", ["metrics"]) => json(body).map(Command::SetMetrics),
        ("PUT", ["actions"]) => json(body).map(|action: Action| Command::Act(action.action_type)),
        ("PATCH", ["vm"]) => json(body).map(|change: VmStateChange| Command::ChangeState(change.state)),
        ("PUT", ["bedplate", "power-button"]) => Ok(Command::PressPowerButton),
        ("PUT", ["bedplate", "stop"]) => Ok(Command::Stop),
        (method, ["hotplug", "memory"]) => {
            hotplug::parse(method, body).map_or_else(unknown, |command| command.map(Command::Hotplug))
        }
        (method, ["balloon", path @ ..]) => {
            balloon::parse(method, path, body).map_or_else(unknown, |command| command.map(Command::Balloon))
        }
        _ => unknown(),
    }
}

pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    crate::json::object(body).map_err(|error| {
        Fault::bad_request(format!("An error occurred when deserializing the json body of a request: {error}."))
    })
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
        assert!(parse("DELETE", "/drives/a", "").unwrap_err().contains("Invalid request method"));
        assert!(parse("GET", "/nowhere", "").unwrap_err().contains("Invalid request method"));
        assert!(parse("GET", "/version", "{}").unwrap_err().contains("cannot have a body"));
        assert!(parse("PUT", "/actions", r#"{"action_type": "Explode"}"#).unwrap_err().contains("Explode"));
    }
}
