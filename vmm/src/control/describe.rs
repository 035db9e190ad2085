//! `GET /vm/config` and `/machine-config` as Firecracker says them: every field that it has is there, with `null` where
//! nobody set it, because its clients look fields up without asking first. Fields of ours are there where they were set.

use bedplate_api::vmm::{CpuTemplate, IoEngine, MachineConfig, VmConfig};
use serde_json::{Map, Value, json};

/// Of the whole, besides what is there always.
const SECTIONS: [&str; 8] =
    ["balloon", "cpu-config", "logger", "metrics", "mmds-config", "vsock", "entropy", "memory-hotplug"];
const OF_BOOT_SOURCE: [&str; 3] = ["kernel_image_path", "initrd_path", "boot_args"];
const OF_DRIVE: [&str; 6] = ["partuuid", "is_read_only", "path_on_host", "rate_limiter", "io_engine", "socket"];
const OF_INTERFACE: [&str; 5] = ["host_dev_name", "guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter"];

/// All that makes the VM.
pub(super) fn vm(spec: &VmConfig) -> Value {
    let mut spec = spec.clone();
    // Its API description has no place for where the console goes.
    spec.serial = None;
    spec.machine_config = machine(&spec.machine_config);
    for drive in spec.drives.iter_mut().filter(|drive| drive.path_on_host.is_some()) {
        drive.is_read_only.get_or_insert(false);
        drive.io_engine.get_or_insert(IoEngine::Sync);
    }
    if let Some(mmds) = &mut spec.mmds_config {
        mmds.ipv4_address.get_or_insert(crate::config::MMDS_ADDRESS);
    }
    if let Some(vsock) = &mut spec.vsock {
        vsock.vsock_id = None;
    }
    // Nothing of it can fail: names are strings, and numbers are no floats.
    let Ok(Value::Object(mut all)) = serde_json::to_value(&spec) else { return Value::Null };
    complete(&mut all, &SECTIONS);
    // Before it is set it names no kernel.
    let unset = all.get("boot-source").is_none();
    let boot_source = all.entry("boot-source").or_insert_with(|| json!({}));
    each(boot_source, |source| complete(source, &OF_BOOT_SOURCE));
    if unset {
        boot_source["kernel_image_path"] = json!("");
    }
    for (section, fields) in
        [("drives", &OF_DRIVE[..]), ("network-interfaces", &OF_INTERFACE), ("pmem", &["rate_limiter"])]
    {
        each(&mut all[section], |device| complete(device, fields));
    }
    each(&mut all["entropy"], |entropy| complete(entropy, &["rate_limiter"]));
    let mut all = Value::Object(all);
    complete_limiters(&mut all);
    all
}

/// vCPUs and memory: a template that stands for none is none.
pub(super) fn machine(spec: &MachineConfig) -> MachineConfig {
    let cpu_template = spec.cpu_template.filter(|template| *template != CpuTemplate::None);
    MachineConfig { cpu_template, ..spec.clone() }
}

/// Does it with an object, or with each object of an array.
fn each(value: &mut Value, mut with: impl FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Object(object) => with(object),
        Value::Array(array) => array.iter_mut().filter_map(Value::as_object_mut).for_each(with),
        _ => {}
    }
}

fn complete(object: &mut Map<String, Value>, names: &[&str]) {
    for name in names {
        object.entry(*name).or_insert(Value::Null);
    }
}

/// Limiters are the same wherever they are.
fn complete_limiters(value: &mut Value) {
    match value {
        Value::Array(array) => array.iter_mut().for_each(complete_limiters),
        Value::Object(object) => {
            for (name, value) in object.iter_mut() {
                if name.ends_with("rate_limiter") {
                    each(value, |limiter| {
                        complete(limiter, &["bandwidth", "ops"]);
                        limiter.values_mut().for_each(|bucket| each(bucket, |it| complete(it, &["one_time_burst"])));
                    });
                } else {
                    complete_limiters(value);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_anything_is_set_every_field_is_there() {
        let said = vm(&VmConfig::default());
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None"});
        let expected = json!({
            "balloon": null, "drives": [], "boot-source": {"kernel_image_path": "", "initrd_path": null, "boot_args": null},
            "cpu-config": null, "logger": null, "machine-config": machine, "metrics": null, "mmds-config": null,
            "network-interfaces": [], "vsock": null, "entropy": null, "pmem": [], "memory-hotplug": null,
        });
        assert_eq!(said, expected);
    }

    #[test]
    fn devices_have_all_of_their_fields_and_can_be_read_again() {
        let text = r#"{
            "boot-source": {"firmware_path": "f"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "None"},
            "drives": [{"drive_id": "d", "path_on_host": "p", "is_root_device": true,
                        "rate_limiter": {"ops": {"size": 1, "refill_time": 2}}},
                       {"drive_id": "e", "socket": "s", "is_root_device": false}],
            "network-interfaces": [{"iface_id": "n", "host_dev_name": "t"}],
            "pmem": [{"id": "m", "path_on_host": "p"}],
            "mmds-config": {"network_interfaces": ["n"]},
            "vsock": {"guest_cid": 3, "uds_path": "v", "vsock_id": "old"},
            "entropy": {},
            "serial": {"serial_out_path": "o"}
        }"#;
        let said = vm(&serde_json::from_str(text).unwrap());
        assert_eq!(
            said["drives"][0],
            json!({"drive_id": "d", "partuuid": null, "is_root_device": true, "cache_type": "Writeback", "is_read_only": false,
                   "path_on_host": "p", "io_engine": "Sync", "socket": null,
                   "rate_limiter": {"bandwidth": null, "ops": {"size": 1, "one_time_burst": null, "refill_time": 2}}})
        );
        assert_eq!((&said["drives"][1]["io_engine"], &said["drives"][1]["is_read_only"]), (&Value::Null, &Value::Null));
        assert_eq!(
            said["network-interfaces"][0],
            json!({"iface_id": "n", "host_dev_name": "t", "guest_mac": null, "mtu": null, "rx_rate_limiter": null,
                   "tx_rate_limiter": null})
        );
        assert_eq!(said["mmds-config"]["ipv4_address"], "169.254.169.254");
        assert_eq!(said["vsock"], json!({"guest_cid": 3, "uds_path": "v"}));
        assert_eq!(said["entropy"], json!({"rate_limiter": null}));
        assert_eq!((&said["boot-source"]["firmware_path"], said.get("serial")), (&json!("f"), None));
        assert!(said["machine-config"].get("cpu_template").is_none());
        let again: VmConfig = serde_json::from_value(said.clone()).unwrap();
        assert_eq!(vm(&again), said);
    }
}
