//! This node's network: the kernel's links and addresses, the bridge and taps of VMs, and DHCP on both sides.

pub mod addresses;
pub mod dhcp;
pub mod link;
pub mod tap;
pub mod vms;
