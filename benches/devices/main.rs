//! Virtio devices from the driver's side: what a request costs on its way through a queue and through each device.
//!
//! The driver is in this process and writes into guest memory that no guest runs in. A notification is a write to the
//! event descriptor that an ioeventfd would signal, and an interrupt is waited for on the one that an irqfd would take: the
//! figures are the device's and the host's alone, without the guest's exits.
// A bench has nobody to report an error to.
#![allow(clippy::unwrap_used)]

mod block;
mod disks;
mod driver;
mod flight;
mod net;
mod others;
mod ring;
mod vsock;
mod wake;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    bedplate_benches::describe_machine();
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(12)
        .nresamples(5_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .configure_from_args();
    ring::benchmark(&mut criterion);
    wake::benchmark(&mut criterion);
    block::benchmark(&mut criterion);
    others::benchmark(&mut criterion);
    vsock::benchmark(&mut criterion);
    net::benchmark(&mut criterion);
    criterion.final_summary();
}
