//! The guest: some bytes of machine code that repeat one access.

/// What the guest does, over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A byte to [`PORT`].
    Port,
    /// A byte to [`ADDRESS`], where a device is.
    Mmio,
    /// A byte to [`PORT`], where an ioeventfd is.
    Notify,
}

/// Where port writes go.
pub const PORT: u16 = 0x500;
/// A write here says that the guest begins: clocks start, so that the making of the VM is not measured.
pub const BEGIN_PORT: u16 = 0x501;
/// And here that it is done.
pub const END_PORT: u16 = 0x502;
/// Where writes to memory go: above all RAM, below the interrupt controllers.
pub const ADDRESS: u32 = 0xd000_0000;
/// Where the code must lie.
pub const CODE_ADDRESS: u16 = 0x1000;

/// Where the segment table is, after the code.
const TABLE: u32 = 0x80;
/// Nothing, and 4 GiB of data from 0.
const SEGMENTS: [u64; 2] = [0, 0x00cf_9200_0000_ffff];

/// Code that does `access` so many times, between writes to [`BEGIN_PORT`] and [`END_PORT`]. It starts in real mode with all segments at 0,
/// and turns protection on, because in real mode nothing above the first MiB can be reached.
pub fn code(access: Access, count: u32) -> Vec<u8> {
    let table = u32::from(CODE_ADDRESS) + TABLE;
    let register = (table + 16) as u16;
    let mut code = vec![0xfa]; // cli
    code.extend([0x0f, 0x01, 0x16]); // lgdt [register]
    code.extend(register.to_le_bytes());
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // cr0 |= 1
    code.extend([0xeb, 0x00]); // jmp to the next instruction
    code.extend([0xbb, 0x08, 0x00, 0x8e, 0xdb]); // ds = 8
    code.extend([0x66, 0xb9]); // mov ecx, count
    code.extend(count.to_le_bytes());
    code.extend([0x66, 0xbf]); // mov edi, ADDRESS
    code.extend(ADDRESS.to_le_bytes());
    code.extend(write_to(BEGIN_PORT));
    code.push(0xba); // mov dx, PORT
    code.extend(PORT.to_le_bytes());
    let repeat: &[u8] = match access {
        Access::Port | Access::Notify => &[0xee], // out dx, al
        Access::Mmio => &[0x67, 0x88, 0x07],      // mov [edi], al
    };
    code.extend(repeat);
    code.extend([0x66, 0x49]); // dec ecx
    code.extend([0x75, (-(repeat.len() as i8 + 4)) as u8]); // jnz
    code.extend(write_to(END_PORT));
    code.push(0xf4); // hlt
    code.resize(TABLE as usize, 0);
    code.extend(SEGMENTS.iter().flat_map(|segment| segment.to_le_bytes()));
    code.extend(15u16.to_le_bytes());
    code.extend(table.to_le_bytes());
    code
}

/// mov dx, port; out dx, al
fn write_to(port: u16) -> [u8; 4] {
    let [low, high] = port.to_le_bytes();
    [0xba, low, high, 0xee]
}
