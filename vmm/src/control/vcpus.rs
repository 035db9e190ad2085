//! `/bedplate/vcpus`.

use bedplate_api::vmm::{LogLevel, Vcpus, VcpusUpdate};

use super::fault::Fault;
use super::session::Session;

impl Session {
    /// The vCPUs of the machine that runs.
    pub(super) fn vcpus(&self) -> Option<Vcpus> {
        self.vm.as_ref().map(|vm| vm.machine.vcpus())
    }

    /// Gives the guest more vCPUs, or tells it again of those that it has.
    pub(super) fn plug_vcpus(&mut self, update: &VcpusUpdate) -> Result<(), Fault> {
        let is_smt = self.spec.machine_config.smt;
        let machine = &mut self.running()?.machine;
        let (asked, Vcpus { count, max_count }) = (update.count, machine.vcpus());
        let why = if asked < count {
            format!(
                "count {asked} is less than the {count} vCPUs that there are: none is taken away while the VM runs. The \
                 guest can leave one idle: echo 0 > /sys/devices/system/cpu/cpuN/online"
            )
        } else if asked > max_count {
            format!("count {asked} is more than {max_count}: set max_vcpu_count in machine-config before the start")
        } else if is_smt && asked > count && !asked.is_multiple_of(2) {
            format!("count {asked} with smt leaves a core with one thread: give an even number")
        } else {
            if !machine.plug_vcpus(asked) {
                return Err(Fault::bad_request(format!(
                    "The {asked} vCPUs did not come in time: the host is busy, or the VM has ended. Ask again"
                )));
            }
            self.spec.machine_config.vcpu_count = asked;
            if asked > count {
                self.log.write(LogLevel::Info, &format!("there are {asked} vCPUs now"));
            }
            return Ok(());
        };
        Err(Fault::bad_request(why))
    }
}
