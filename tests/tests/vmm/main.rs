//! `bedplate-vmm` with real guests, in an emulated node. Each scenario is both halves: what the node does, and what is
//! typed in the guest.

mod api;
mod balloon;
mod block;
mod boot;
mod console;
mod core_dump;
mod debugger;
mod ends;
mod firmware;
mod hotplug;
mod intx;
mod machine;
mod metadata;
mod mmio;
mod net_backend;
mod network;
mod plug;
mod pmem;
mod pmem_plug;
mod processor;
mod refusals;
mod sandbox;
mod serial;
mod timer;
mod vcpus;
mod vhost;
mod vhost_user;
mod vsock;

use std::process::ExitCode;
use std::time::Duration;

use bedplate_tests::inside::{BZIMAGE, ELF};
use bedplate_tests::suite::{self, NodeSpec, Scenario};

fn main() -> ExitCode {
    let node = NodeSpec {
        memory_mib: 4096,
        programs: &["bedplate-vmm"],
        debian: &[vhost_user::VIRTIOFSD, vhost_user::STORAGE],
        patience: Duration::from_secs(600),
    };
    let scenarios = [
        Scenario { name: "boots_the_bzimage_as_shipped", run: || boot::boots(BZIMAGE) },
        Scenario { name: "boots_the_elf_kernel", run: || boot::boots(ELF) },
        Scenario { name: "runs_2_vcpus", run: || boot::vcpus(2) },
        Scenario { name: "runs_8_vcpus", run: || boot::vcpus(8) },
        Scenario { name: "gives_entropy", run: boot::entropy },
        Scenario { name: "firmware_starts_a_disks_own_boot_loader", run: firmware::boots },
        Scenario { name: "firmware_without_a_boot_loader_says_so", run: firmware::nothing_to_boot },
        Scenario { name: "breakpoints_are_the_debuggers_or_the_guests", run: debugger::breakpoints },
        Scenario { name: "a_kernel_is_debugged", run: debugger::kernel },
        Scenario { name: "a_core_dump_is_read_back", run: core_dump::is_read_back },
        Scenario { name: "a_reboot_ends_it", run: ends::reboot },
        Scenario { name: "the_power_button_ends_it", run: ends::power_button },
        Scenario { name: "sigterm_is_the_power_button", run: ends::sigterm },
        Scenario { name: "pauses_and_resumes", run: ends::pause_and_resume },
        Scenario { name: "stop_ends_it_at_once", run: ends::stop },
        Scenario { name: "a_kernel_panic_ends_it", run: ends::panic },
        Scenario { name: "a_raw_disk_is_read_and_written", run: || block::raw("Sync") },
        Scenario { name: "a_raw_disk_is_read_and_written_through_io_uring", run: || block::raw("Async") },
        Scenario { name: "what_is_discarded_is_a_hole", run: block::discard },
        Scenario { name: "a_file_that_shrinks_fails_its_own_reads_only", run: block::shrinks },
        Scenario { name: "a_limited_disk_is_slow", run: block::limited },
        Scenario { name: "a_disk_is_found_where_the_guest_has_put_it", run: block::elsewhere },
        Scenario { name: "a_guest_without_pci_has_all_devices", run: mmio::without_pci },
        Scenario { name: "the_kernel_carries_frames_of_a_guest_without_pci", run: mmio::with_vhost },
        Scenario { name: "a_guest_without_apics_has_disks", run: mmio::without_apics },
        Scenario { name: "a_guest_with_pci_has_no_device_twice", run: mmio::beside_pci },
        Scenario { name: "a_guest_without_messages_has_all_devices", run: intx::without_messages },
        Scenario { name: "so_has_one_that_does_not_go_by_acpi", run: intx::without_messages_and_acpi_for_pci },
        Scenario { name: "the_kernel_carries_frames_of_a_guest_without_messages", run: intx::with_vhost },
        Scenario {
            name: "a_storage_daemon_has_the_disk_of_a_guest_without_messages",
            run: || vhost_user::disk_of("pci=nomsi"),
        },
        Scenario { name: "disks_come_and_go_without_messages", run: intx::plugged },
        Scenario { name: "a_guest_with_pci_and_without_apics_has_disks", run: intx::without_apics },
        Scenario { name: "a_guest_without_other_timers_is_woken_by_the_first_pcs", run: timer::wakes },
        Scenario { name: "a_read_only_disk_refuses_writes", run: block::read_only },
        Scenario { name: "a_copy_on_write_disk_leaves_its_image_alone", run: block::copy_on_write },
        Scenario { name: "synced_data_survives_kill_9", run: block::survives_kill },
        Scenario { name: "a_shared_disk_is_held_by_an_idle_guest_and_free_after_it", run: block::shared },
        Scenario { name: "free_pages_go_back_to_the_node", run: balloon::reports_free_pages },
        Scenario { name: "a_balloon_is_inflated_and_says_how_it_is", run: balloon::inflates_and_says_how_it_is },
        Scenario { name: "vcpus_come_and_work", run: vcpus::come },
        Scenario { name: "vcpus_come_after_firmware", run: vcpus::firmware },
        Scenario { name: "memory_is_added_and_taken_away", run: hotplug::grows_and_shrinks },
        Scenario { name: "a_pmem_device_keeps_what_is_synced", run: pmem::keeps_what_is_synced },
        Scenario { name: "a_pmem_file_that_shrinks_ends_its_vm", run: pmem::shrinks },
        Scenario { name: "a_pmem_device_is_the_root_device", run: pmem::is_the_root_device },
        Scenario { name: "pmem_is_no_buffer_for_other_devices", run: pmem::is_no_buffer_for_other_devices },
        Scenario { name: "network_both_ways_in_bulk", run: network::host_and_guest },
        Scenario { name: "two_vcpus_have_a_pair_of_queues_each", run: network::two_pairs },
        Scenario { name: "the_kernel_carries_frames", run: || vhost::both_ways(1) },
        Scenario { name: "the_kernel_carries_frames_of_two_pairs", run: || vhost::both_ways(2) },
        Scenario { name: "the_kernel_carries_frames_in_memory_that_was_added", run: vhost::added_memory },
        Scenario { name: "what_vhost_cannot_do_is_refused", run: vhost::refusals },
        Scenario { name: "a_directory_of_the_node_is_mounted", run: vhost_user::file_system },
        Scenario { name: "a_file_system_whose_backend_dies_takes_nothing_along", run: vhost_user::dies },
        Scenario { name: "a_storage_daemon_has_the_disk", run: vhost_user::disk },
        Scenario { name: "a_storage_daemon_has_the_root_device", run: vhost_user::root_device },
        Scenario { name: "another_process_carries_the_frames", run: vhost_user::network },
        Scenario { name: "guests_reach_each_other", run: network::guest_and_guest },
        Scenario { name: "disks_and_interfaces_come_and_go", run: plug::come_and_go },
        Scenario { name: "a_guest_is_asked_for_a_device_and_keeps_the_others", run: plug::is_asked },
        Scenario { name: "a_device_that_comes_before_the_guest_does_is_found", run: plug::before_it_listens },
        Scenario { name: "the_bus_is_filled_and_emptied", run: plug::fill_the_bus },
        Scenario { name: "a_plugged_copy_on_write_disk_keeps_what_was_written", run: plug::copy_on_write },
        Scenario { name: "pmem_devices_come_and_go", run: pmem_plug::come_and_go },
        Scenario { name: "a_pmem_device_goes_and_another_takes_its_place", run: pmem_plug::one_for_another },
        Scenario { name: "the_bus_is_filled_with_pmem_devices_and_emptied", run: pmem_plug::fill_the_bus },
        Scenario { name: "the_kernel_carries_frames_while_pmem_devices_come_and_go", run: pmem_plug::beside_vhost },
        Scenario { name: "a_pmem_device_that_vhost_has_no_room_for_is_refused", run: pmem_plug::too_many_for_vhost },
        Scenario { name: "a_pmem_device_comes_after_firmware", run: pmem_plug::with_firmware },
        Scenario { name: "vsock_both_ways", run: vsock::both_ways },
        Scenario { name: "the_virtio_console_has_two_ends", run: console::socket },
        Scenario { name: "a_system_lives_on_the_virtio_console", run: console::system },
        Scenario { name: "the_serial_socket_has_a_backlog_and_many_clients", run: serial::socket },
        Scenario { name: "the_serial_log_is_written", run: serial::log },
        Scenario { name: "is_configured_and_started_through_the_api", run: api::configured_by_api },
        Scenario { name: "the_api_refuses_bad_requests", run: api::bad_requests },
        Scenario { name: "threads_share_cores", run: machine::threads },
        Scenario { name: "a_template_changes_the_processor", run: machine::templates },
        Scenario { name: "firecrackers_names_of_processors_are_for_their_models", run: processor::templates },
        Scenario { name: "baselines_have_their_features_and_no_others", run: processor::baselines },
        Scenario { name: "what_a_baseline_hides_faults", run: processor::hidden_faults },
        Scenario { name: "the_guest_knows_what_time_it_is", run: processor::clock },
        Scenario { name: "memory_is_in_huge_pages", run: machine::huge_pages },
        Scenario { name: "the_boot_timer_is_logged", run: machine::boot_timer },
        Scenario { name: "a_disk_grows_and_is_replaced", run: machine::disks },
        Scenario { name: "the_guest_reads_its_metadata", run: metadata::version_1 },
        Scenario { name: "the_guest_needs_a_token_for_its_metadata", run: metadata::version_2 },
        Scenario { name: "a_vmm_has_nothing_left_when_its_guest_runs", run: sandbox::walls },
        Scenario { name: "without_a_sandbox_it_says_so", run: sandbox::none },
        Scenario { name: "bad_kernels_are_refused", run: refusals::kernels },
        Scenario { name: "bad_configurations_are_refused", run: refusals::configurations },
        Scenario { name: "missing_host_things_are_named", run: refusals::host_things },
    ];
    suite::main("vmm", &node, &scenarios)
}
