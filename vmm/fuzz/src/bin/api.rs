//! Requests to the API: what is not understood is refused, whatever it is.
#![no_main]

use bedplate_vmm::control::understands;

/// What a request can begin with: of most paths made up of bytes nothing would be learned.
const ENDPOINTS: [&str; 24] = [
    "PUT /boot-source",
    "PUT /machine-config",
    "PATCH /machine-config",
    "PUT /cpu-config",
    "PUT /drives/a",
    "PATCH /drives/a",
    "PUT /network-interfaces/a",
    "PATCH /network-interfaces/a",
    "PUT /mmds",
    "PATCH /mmds",
    "PUT /mmds/config",
    "PUT /vsock",
    "PUT /entropy",
    "PUT /balloon",
    "PATCH /balloon",
    "PATCH /balloon/hinting/start",
    "PUT /serial",
    "PUT /logger",
    "PUT /metrics",
    "PUT /hotplug/memory",
    "PATCH /hotplug/memory",
    "PUT /snapshot/load",
    "PUT /actions",
    "PATCH /vm",
];

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    match ENDPOINTS.get(usize::from(choice)).and_then(|endpoint| endpoint.split_once(' ')) {
        Some((method, path)) => drop(understands(method, path, rest)),
        None => {
            let text = String::from_utf8_lossy(rest);
            let (path, body) = text.split_once('\n').unwrap_or((&text, ""));
            for method in ["GET", "PUT", "PATCH", "DELETE", "BREW"] {
                let understood = understands(method, path, body.as_bytes());
                assert!(!understood || method != "BREW", "{path:?}");
            }
        }
    }
});
