//! A line of metrics: the status, and what devices count also where Firecracker's readers look for it.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use bedplate_api::vmm::{DeviceStatus, Metrics, MetricsLine, Status};

/// What `status` says, as `spec` wants it.
pub(super) fn line(spec: &Metrics, mut status: Status) -> MetricsLine {
    if !spec.emit_id {
        status.id.clear();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    MetricsLine {
        // Reaches to the year 584 million.
        utc_timestamp_ms: now.as_millis() as u64,
        properties: spec.properties.clone(),
        counters: named(&status.devices),
        status,
    }
}

/// The counters of each device, and of all drives, of all interfaces and of all pmem devices their sum.
fn named(devices: &BTreeMap<String, DeviceStatus>) -> BTreeMap<String, BTreeMap<String, u64>> {
    let mut named = BTreeMap::<_, BTreeMap<_, u64>>::new();
    for (name, device) in devices {
        let kind = ["block", "net", "pmem"]
            .into_iter()
            .find(|kind| name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('_')));
        for (counter, value) in &device.counters {
            named.entry(name.clone()).or_default().insert(counter.clone(), *value);
            if let Some(kind) = kind {
                *named.entry(kind.to_owned()).or_default().entry(counter.clone()).or_default() += value;
            }
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use bedplate_api::vmm::{ExitCounts, RunState};

    use super::*;

    #[test]
    fn a_line_of_metrics_has_each_device_and_the_sums() {
        let device = |reads: u64| DeviceStatus {
            counters: BTreeMap::from([("read_count".to_owned(), reads)]),
            ..DeviceStatus::default()
        };
        let names = [("block_a", 2), ("block_b_c", 3), ("balloon", 7)];
        let status = Status {
            id: "vm".into(),
            state: RunState::Running,
            pid: 1,
            uptime_seconds: 0,
            process_startup_time_us: None,
            process_startup_time_cpu_us: None,
            exits: ExitCounts::default(),
            vcpus: None,
            devices: names.into_iter().map(|(name, reads)| (name.to_owned(), device(reads))).collect(),
        };
        let properties = Some(BTreeMap::from([("zone".to_owned(), "a".to_owned())]));
        let mut spec = Metrics { metrics_path: "m".into(), emit_id: true, properties };
        let line = |spec: &Metrics| serde_json::to_value(super::line(spec, status.clone())).unwrap();
        let said = line(&spec);
        let reads = |name: &str| said[name]["read_count"].as_u64();
        assert_eq!(["block_a", "block_b_c", "block", "balloon"].map(reads), [Some(2), Some(3), Some(5), Some(7)]);
        assert_eq!((&said["id"], &said["devices"]["balloon"]["read_count"]), (&"vm".into(), &7.into()));
        assert_eq!(said["properties"]["zone"], "a");
        assert!(said["utc_timestamp_ms"].as_u64().is_some_and(|ms| ms > 1_700_000_000_000));
        spec.emit_id = false;
        assert!(line(&spec).get("id").is_none());
    }
}
