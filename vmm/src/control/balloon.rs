//! `/balloon` and what is below it. Faults are in Firecracker's words, which its clients may look at.

use bedplate_api::vmm::{Balloon, BalloonStats, BalloonStatsUpdate, BalloonUpdate, HintingStart, HintingStatus};
use bedplate_devices::virtio::balloon::BalloonControl;

use super::commands::Answer;
use super::fault::Fault;
use super::session::Session;
use crate::config;

const NONE: &str = "No balloon device found.";
const NO_STATISTICS: &str = "Statistics for the balloon device are not enabled";
const STATISTICS_STAY: &str = "Cannot enable/disable the statistics after boot.";
const NO_HINTING: &str = "Free page hinting for the balloon device is not enabled";

/// What can be asked of a balloon.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum BalloonCommand {
    /// Before the start.
    Set(Balloon),
    /// Always.
    Describe,
    /// After the start, as all below.
    Update(BalloonUpdate),
    DescribeStatistics,
    UpdateStatistics(BalloonStatsUpdate),
    StartHinting(HintingStart),
    DescribeHinting,
    StopHinting,
}

impl Session {
    pub(super) fn execute_balloon(&mut self, command: BalloonCommand) -> Result<Answer, Fault> {
        let memory_mib = self.spec.machine_config.mem_size_mib;
        match command {
            BalloonCommand::Set(balloon) => {
                let session = self.before_start()?;
                config::balloon(&balloon, memory_mib).map_err(Fault::bad_request)?;
                session.spec.balloon = Some(balloon);
            }
            BalloonCommand::Describe => {
                let balloon = self.spec.balloon.clone();
                return balloon.map(Answer::Balloon).ok_or_else(|| Fault::bad_request(NONE));
            }
            BalloonCommand::Update(update) => {
                let control = self.balloon()?;
                let pages = config::balloon_pages(update.amount_mib, memory_mib).map_err(Fault::bad_request)?;
                control.set_target(pages);
                self.change(|balloon| balloon.amount_mib = update.amount_mib);
            }
            BalloonCommand::DescribeStatistics => {
                let control = self.balloon()?;
                return with_statistics(control).map(|()| Answer::BalloonStats(Box::new(statistics(control))));
            }
            BalloonCommand::UpdateStatistics(BalloonStatsUpdate { stats_polling_interval_s: seconds }) => {
                let control = self.balloon()?;
                if (control.stats_interval() == 0) != (seconds == 0) {
                    return Err(Fault::bad_request(STATISTICS_STAY));
                }
                if seconds != 0 {
                    control.set_stats_interval(seconds);
                }
                self.change(|balloon| balloon.stats_polling_interval_s = seconds);
            }
            BalloonCommand::StartHinting(start) => self.hinting()?.start_hinting(start.acknowledge_on_stop),
            BalloonCommand::DescribeHinting => {
                let (host_cmd, guest_cmd) = self.hinting()?.hinting_commands();
                return Ok(Answer::Hinting(HintingStatus { host_cmd, guest_cmd }));
            }
            BalloonCommand::StopHinting => self.hinting()?.stop_hinting(),
        }
        Ok(Answer::Done)
    }

    /// The balloon of the VM that runs, if one was asked for: of the other nobody knows.
    fn balloon(&mut self) -> Result<&BalloonControl, Fault> {
        let asked = self.spec.balloon.is_some();
        let balloon = self.running()?.machine.devices().balloon();
        balloon.filter(|_| asked).ok_or_else(|| Fault::bad_request(NONE))
    }

    fn hinting(&mut self) -> Result<&BalloonControl, Fault> {
        let control = self.balloon()?;
        if control.hinting() { Ok(control) } else { Err(Fault::bad_request(NO_HINTING)) }
    }

    fn change(&mut self, change: impl FnOnce(&mut Balloon)) {
        if let Some(balloon) = &mut self.spec.balloon {
            change(balloon);
        }
    }
}

fn with_statistics(control: &BalloonControl) -> Result<(), Fault> {
    if control.stats_interval() == 0 { Err(Fault::bad_request(NO_STATISTICS)) } else { Ok(()) }
}

fn statistics(control: &BalloonControl) -> BalloonStats {
    // In the order of their tags.
    let [
        swap_in,
        swap_out,
        major_faults,
        minor_faults,
        free_memory,
        total_memory,
        available_memory,
        disk_caches,
        hugetlb_allocations,
        hugetlb_failures,
        oom_kill,
        alloc_stall,
        async_scan,
        direct_scan,
        async_reclaim,
        direct_reclaim,
    ] = control.stats();
    let (target_pages, actual_pages) = (control.target(), control.actual());
    BalloonStats {
        target_pages,
        actual_pages,
        target_mib: target_pages / 256,
        actual_mib: actual_pages / 256,
        swap_in,
        swap_out,
        major_faults,
        minor_faults,
        free_memory,
        total_memory,
        available_memory,
        disk_caches,
        hugetlb_allocations,
        hugetlb_failures,
        oom_kill,
        alloc_stall,
        async_scan,
        direct_scan,
        async_reclaim,
        direct_reclaim,
    }
}
