//! The kernel's command line, as far as it is ours: pure.

use bedplate_api::client::Endpoint;

use crate::identity::{format_mac, parse_mac};

/// How many VMs a node provides where nobody said.
const DEFAULT_SLOTS: u32 = 8;

/// What the boot service tells a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BootOptions {
    /// The control node.
    pub control: Option<Endpoint>,
    /// The cluster's token.
    pub token: Option<String>,
    /// How many VMs to provide.
    pub slots: u32,
    /// The interface that the machine booted from.
    pub mac: Option<[u8; 6]>,
}

/// Reads every `bedplate.` word. A word that is not understood is returned, without its value: it may be a secret.
pub(super) fn parse(text: &str) -> (BootOptions, Vec<String>) {
    let mut options = BootOptions { control: None, token: None, slots: DEFAULT_SLOTS, mac: None };
    let mut unknown = Vec::new();
    for word in text.split_ascii_whitespace().filter_map(|w| w.strip_prefix("bedplate.")) {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let understood = match key {
            "control" => value.parse().map(|endpoint| options.control = Some(endpoint)).is_ok(),
            "token" => {
                let sane = !value.is_empty() && value.bytes().all(|b| b.is_ascii_alphanumeric());
                options.token = sane.then(|| value.to_owned());
                sane
            }
            "slots" => value.parse().map(|slots| options.slots = slots).is_ok(),
            "mac" => {
                options.mac = parse_mac(value);
                options.mac.is_some()
            }
            _ => false,
        };
        if !understood {
            unknown.push(format!("bedplate.{key}"));
        }
    }
    (options, unknown)
}

impl BootOptions {
    /// The arguments of the agent, whose token is in the file `token_file`.
    pub fn agent_args(&self, token_file: &str, port: u16) -> Vec<String> {
        let mut args: Vec<String> = ["agent", "--socket", "/run/bedplate/node.sock"].map(String::from).to_vec();
        args.extend(["--slots".to_owned(), self.slots.to_string()]);
        if let Some(mac) = self.mac {
            args.extend(["--mac".to_owned(), format_mac(mac)]);
        }
        if self.token.is_some() {
            args.extend(["--token-file".to_owned(), token_file.to_owned()]);
            args.extend(["--listen".to_owned(), format!("0.0.0.0:{port}")]);
            if let Some(control) = &self.control {
                args.extend(["--control".to_owned(), control.to_string()]);
            }
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_boot_script_says_is_understood() {
        let (options, unknown) = parse(
            "quiet bedplate.control=http://10.77.0.1:7070 bedplate.token=00ff bedplate.slots=4 \
             bedplate.mac=52:54:00:00:00:0A console=ttyS0 panic=-1\n",
        );
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(options.slots, 4);
        assert_eq!(options.mac.map(format_mac).as_deref(), Some("52:54:00:00:00:0a"));
        let args = options.agent_args("/t", 1).join(" ");
        assert_eq!(
            args,
            "agent --socket /run/bedplate/node.sock --slots 4 --mac 52:54:00:00:00:0a --token-file /t \
             --listen 0.0.0.0:1 --control http://10.77.0.1:7070"
        );
        assert!(!args.contains("00ff"), "a process's arguments can be read by all");
    }

    #[test]
    fn what_is_not_understood_is_named_without_its_value() {
        let (options, unknown) =
            parse("bedplate.control=ftp://x bedplate.mac=y bedplate.slots=-1 bedplate.tokn=s3cret bedplate.token= a=b");
        assert_eq!(unknown, ["bedplate.control", "bedplate.mac", "bedplate.slots", "bedplate.tokn", "bedplate.token"]);
        assert_eq!(options, BootOptions { control: None, token: None, slots: DEFAULT_SLOTS, mac: None });
    }
}
