//! All registers of a vCPU that a debugger or a core dump shows.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

use super::{KvmError, Vcpu, call};

/// Registers as KVM has them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct VcpuState {
    /// General ones.
    pub regs: kvm_regs,
    /// Segments, control registers, tables.
    pub sregs: kvm_sregs,
    /// x87 and SSE.
    pub fpu: kvm_fpu,
}

impl Vcpu {
    /// All of them. For the vCPU's own thread, between two runs.
    ///
    /// # Errors
    /// KVM does not give them.
    pub fn state(&self) -> Result<VcpuState, KvmError> {
        Ok(VcpuState {
            regs: self.fd.get_regs().map_err(call("read the registers of a vCPU"))?,
            sregs: self.fd.get_sregs().map_err(call("read the special registers of a vCPU"))?,
            fpu: self.fd.get_fpu().map_err(call("read the floating-point registers of a vCPU"))?,
        })
    }

    /// Makes them `state`. Groups that are like that already are not touched.
    ///
    /// # Errors
    /// KVM refuses; some may have changed.
    pub fn set_state(&self, state: &VcpuState) -> Result<(), KvmError> {
        let now = self.state()?;
        if now.sregs != state.sregs {
            self.fd.set_sregs(&state.sregs).map_err(call("set the special registers of a vCPU"))?;
        }
        if now.fpu != state.fpu {
            self.fd.set_fpu(&state.fpu).map_err(call("set the floating-point registers of a vCPU"))?;
        }
        if now.regs != state.regs {
            self.fd.set_regs(&state.regs).map_err(call("set the registers of a vCPU"))?;
        }
        Ok(())
    }
}
