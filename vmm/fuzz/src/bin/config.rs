//! Configuration files: what is accepted is within the limits that everything after it counts on.
#![no_main]

use bedplate_vmm::{config, json};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(spec) = json::object(bytes) else { return };
    if let Ok(config) = config::validate(&spec) {
        assert!((1..=config::MAX_VCPUS).contains(&config.topology.vcpus), "{config:?}");
        assert!(config.memory_mib >= 16, "{config:?}");
    }
});
