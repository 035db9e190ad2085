//! `/bedplate/console`.

use bedplate_api::vmm::VirtioConsole;
use bedplate_devices::virtio::console::WindowSize;

use crate::console::Target;

/// A virtio console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Where it goes: a socket or a file.
    pub target: Target,
    /// Of the window that shows it.
    pub size: WindowSize,
}

/// It goes nowhere, or twice.
#[derive(Debug, thiserror::Error)]
#[error("console: name a socket or a file where it goes, one of the two")]
pub struct ConsoleConfigError;

/// Checks a console.
///
/// # Errors
/// Not one place is named.
pub fn console(spec: &VirtioConsole) -> Result<ConsoleConfig, ConsoleConfigError> {
    let target = match (&spec.socket, &spec.file) {
        (Some(path), None) if !path.is_empty() => Target::Socket(path.into()),
        (None, Some(path)) if !path.is_empty() => Target::File(path.into()),
        _ => return Err(ConsoleConfigError),
    };
    Ok(ConsoleConfig { target, size: WindowSize { columns: spec.columns, rows: spec.rows } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_goes_to_one_place() {
        let check = |json: &str| console(&serde_json::from_str(json).unwrap());
        let config = check(r#"{"socket": "/run/c", "columns": 80}"#).unwrap();
        assert_eq!(config.target, Target::Socket("/run/c".into()));
        assert_eq!(config.size, WindowSize { columns: 80, rows: 0 });
        assert_eq!(check(r#"{"file": "f"}"#).unwrap().target, Target::File("f".into()));
        for wrong in ["{}", r#"{"socket": "a", "file": "b"}"#, r#"{"socket": ""}"#, r#"{"file": ""}"#] {
            assert!(check(wrong).unwrap_err().to_string().contains("a socket or a file"), "{wrong}");
        }
    }
}
