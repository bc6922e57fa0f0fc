//! Packets as programs may touch them: the only pointer arithmetic of this crate.
//!
//! Every borrow of packet bytes is checked against the packet's end, as the verifier demands. Helpers that move the
//! bytes take `&mut self`, so the compiler refuses a borrow that was made before them and the verifier never has to
//! ("invalid access to packet").

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_DEC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_INGRESS,
        bpf_adj_room_mode::{self, BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
        xdp_md,
    },
    helpers::{
        bpf_csum_level, bpf_csum_update, bpf_get_hash_recalc, bpf_redirect, bpf_redirect_neigh,
        bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_pull_data, bpf_xdp_adjust_head,
        bpf_xdp_adjust_meta,
    },
    programs::{TcContext, XdpContext},
};
use bytemuck::Pod;
use flannel_common::{
    OVERHEAD,
    header::{DRESS_GROWTH, DRESS_MAC, Dress, ETHERNET, ETHERTYPE_IPV4, Ethernet, Outer},
};

use crate::maps::Traffic;

/// `bpf_skb_adjust_room` on a packet that still carries tunnel state (`EALREADY`).
const ALREADY_ENCAPSULATED: i64 = -114;

/// Flags of `bpf_skb_adjust_room` that leave everything as it is but the room.
const PLAINLY: u32 = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;

/// The Ethernet header of a dressed packet, as words: an array would become a constant section of the object.
const TO_THE_ROOM: (u64, u32, u16) = {
    let [a, b, c, d, e, f] = DRESS_MAC;
    (u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), 0, ETHERTYPE_IPV4.to_be())
};

/// Why there is no room for an outer header.
pub(crate) enum NoRoom {
    /// The packet came through a tunnel and the kernel has not forgotten that.
    AlreadyEncapsulated,
    Other,
}

/// A packet in tc.
pub(crate) struct Skb {
    raw: *mut __sk_buff,
}

impl Skb {
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext) -> Self {
        Self { raw: ctx.skb.skb }
    }

    /// The bytes at `offset`, when they are in the packet's linear part.
    #[inline(always)]
    pub(crate) fn read<T: Pod>(&self, offset: usize) -> Option<&T> {
        let at = within::<T>(self.start() + offset, self.end())?;
        // SAFETY: `within` has checked the bounds; `T` is any bytes at any alignment.
        Some(unsafe { &*at })
    }

    /// [`Self::read`] to change them.
    #[inline(always)]
    pub(crate) fn write<T: Pod>(&mut self, offset: usize) -> Option<&mut T> {
        let at = within::<T>(self.start() + offset, self.end())?;
        // SAFETY: as in `read`; `&mut self` is the only way to the packet.
        Some(unsafe { &mut *at })
    }

    /// [`Self::read`], after making them linear if the packet is long enough.
    #[inline(always)]
    pub(crate) fn pull<T: Pod>(&mut self, offset: usize) -> Option<&T> {
        let needed = (offset + size_of::<T>()) as u32;
        if self.end() < self.start() + needed as usize {
            // SAFETY: the helper checks everything itself.
            if self.len() < needed || unsafe { bpf_skb_pull_data(self.raw, needed) } != 0 {
                return None;
            }
        }
        self.read(offset)
    }

    /// What an XDP program left in front of the packet.
    #[inline(always)]
    pub(crate) fn metadata(&self) -> Option<u32> {
        // SAFETY: the context is valid while the program runs.
        let start = unsafe { (*self.raw).data_meta } as usize;
        let at = within::<[u8; 4]>(start, self.start())?;
        // SAFETY: as in `read`.
        Some(u32::from_ne_bytes(unsafe { *at }))
    }

    /// Bytes of the packet, from the Ethernet header on where the device has one.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.raw).len }
    }

    /// Whether the packet is untagged IPv4. A VLAN tag may be stripped from the bytes and yet belong to the packet.
    #[inline(always)]
    pub(crate) fn is_ipv4(&self) -> bool {
        // SAFETY: as in `len`.
        unsafe { (*self.raw).protocol == u32::from(ETHERTYPE_IPV4.to_be()) && (*self.raw).vlan_present == 0 }
    }

    /// Whether the packet stands for several that are still to be split off it.
    #[inline(always)]
    pub(crate) fn is_gso(&self) -> bool {
        // SAFETY: as in `len`.
        unsafe { (*self.raw).gso_size != 0 }
    }

    /// The packet as counted, when its inner part has `bytes`.
    #[inline(always)]
    pub(crate) fn traffic(&self, bytes: u32) -> Traffic {
        // SAFETY: as in `len`.
        let segments = unsafe { (*self.raw).gso_segs };
        Traffic { packets: if segments == 0 { 1 } else { segments }, bytes }
    }

    /// Hash of the flow, the same for all its packets: the socket's or the card's, if one of them has made one.
    #[inline(always)]
    pub(crate) fn flow_hash(&mut self) -> u32 {
        // SAFETY: as in `len`.
        let known = unsafe { (*self.raw).hash };
        // SAFETY: the helper has no preconditions.
        if known != 0 { known } else { unsafe { bpf_get_hash_recalc(self.raw) } }
    }

    /// Makes room for an outer header and tells the kernel that it is one, so that GSO packets can be split behind it.
    #[inline(always)]
    pub(crate) fn grow(&mut self) -> Result<(), NoRoom> {
        match self.adjust_room(
            OVERHEAD as i32,
            BPF_ADJ_ROOM_MAC,
            BPF_F_ADJ_ROOM_FIXED_GSO
                | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
                | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
                | BPF_F_ADJ_ROOM_NO_CSUM_RESET,
        ) {
            0 => Ok(()),
            ALREADY_ENCAPSULATED => Err(NoRoom::AlreadyEncapsulated),
            _ => Err(NoRoom::Other),
        }
    }

    /// Makes room without telling what for. Not for GSO packets: nobody could split them.
    #[inline(always)]
    pub(crate) fn grow_plainly(&mut self) -> Result<(), NoRoom> {
        match self.adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, PLAINLY) {
            0 => Ok(()),
            _ => Err(NoRoom::Other),
        }
    }

    /// Cuts the outer header off, behind the Ethernet header.
    #[inline(always)]
    pub(crate) fn shrink(&mut self) -> Result<(), NoRoom> {
        match self.adjust_room(-(OVERHEAD as i32), BPF_ADJ_ROOM_MAC, PLAINLY) {
            0 => {
                // The NIC vouched for one checksum fewer now. It may have vouched for none: then this is refused, and
                // rightly without effect.
                // SAFETY: the helper has no preconditions.
                let _ = unsafe { bpf_csum_level(self.raw, u64::from(BPF_CSUM_LEVEL_DEC)) };
                Ok(())
            }
            _ => Err(NoRoom::Other),
        }
    }

    /// Exchanges the outer header, behind the Ethernet header, for a dress.
    #[inline(always)]
    pub(crate) fn put_on(&mut self, dress: &Dress) -> Result<(), NoRoom> {
        let Some(change) = self.read::<Outer>(ETHERNET).map(|outer| dress.change_of_sum(outer)) else {
            return Err(NoRoom::Other);
        };
        if self.adjust_room(DRESS_GROWTH as i32, BPF_ADJ_ROOM_NET, PLAINLY) != 0 {
            return Err(NoRoom::Other);
        }
        match self.write::<Dress>(ETHERNET) {
            Some(place) => *place = *dress,
            None => return Err(NoRoom::Other),
        }
        // Where the NIC has summed the whole packet, the sum must follow; elsewhere this is refused, and rightly without
        // effect.
        // SAFETY: the helper has no preconditions.
        let _ = unsafe { bpf_csum_update(self.raw, change) };
        self.write::<Ethernet>(0).ok_or(NoRoom::Other)?.set_words(TO_THE_ROOM);
        Ok(())
    }

    #[inline(always)]
    fn adjust_room(&mut self, by: i32, mode: bpf_adj_room_mode::Type, flags: u32) -> i64 {
        // SAFETY: the helper checks everything itself; packet borrows end at `&mut self`.
        unsafe { bpf_skb_adjust_room(self.raw, by, mode, u64::from(flags)) }
    }

    /// Puts an empty Ethernet header in front of a packet of an L3 device.
    #[inline(always)]
    pub(crate) fn add_ethernet(&mut self) -> Result<(), NoRoom> {
        // SAFETY: as in `adjust_room`.
        match unsafe { bpf_skb_change_head(self.raw, ETHERNET as u32, 0) } {
            0 => Ok(()),
            _ => Err(NoRoom::Other),
        }
    }

    /// The verdict that sends the packet out of `ifindex`, by the route and to the MAC address that the kernel finds for
    /// the outer destination.
    ///
    /// No next hop is given on purpose. With one, the packet keeps the route that brought it to the tunnel device; when
    /// the neighbour's address has to be asked for first, the queued packet then leaves by that route's neighbour entry
    /// (`neigh_update`, net/core/neighbour.c), which writes no Ethernet header: the first packet to a quiet peer would be
    /// lost.
    #[inline(always)]
    pub(crate) fn send_from(self, ifindex: u32) -> i32 {
        // SAFETY: a null pointer of length 0 asks for the lookup; nothing is read from it.
        unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }

    /// The verdict that makes the packet one received on `ifindex`.
    #[inline(always)]
    pub(crate) fn receive_on(self, ifindex: u32) -> i32 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
    }

    /// The verdict that sends the packet out of `ifindex` as it is.
    #[inline(always)]
    pub(crate) fn send_through(self, ifindex: u32) -> i32 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: as in `len`.
        unsafe { (*self.raw).data as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as in `len`.
        unsafe { (*self.raw).data_end as usize }
    }
}

/// A frame in XDP.
pub(crate) struct Frame {
    raw: *mut xdp_md,
}

impl Frame {
    #[inline(always)]
    pub(crate) fn new(ctx: &XdpContext) -> Self {
        Self { raw: ctx.ctx }
    }

    /// The frame's first bytes.
    #[inline(always)]
    pub(crate) fn read<T: Pod>(&self) -> Option<&T> {
        let at = within::<T>(self.start(), self.end())?;
        // SAFETY: `within` has checked the bounds; `T` is any bytes at any alignment.
        Some(unsafe { &*at })
    }

    /// [`Self::read`] to change them.
    #[inline(always)]
    pub(crate) fn write<T: Pod>(&mut self) -> Option<&mut T> {
        let at = within::<T>(self.start(), self.end())?;
        // SAFETY: as in `read`; `&mut self` is the only way to the frame.
        Some(unsafe { &mut *at })
    }

    /// Puts `mark` in front of the frame for tc to see. False when the driver keeps no metadata; the frame is then as
    /// it was.
    #[inline(always)]
    pub(crate) fn mark(&mut self, mark: u32) -> bool {
        // SAFETY: the helper checks everything itself; borrows end at `&mut self`.
        if unsafe { bpf_xdp_adjust_meta(self.raw, -(size_of::<u32>() as i32)) } != 0 {
            return false;
        }
        // SAFETY: the context is valid while the program runs.
        let start = unsafe { (*self.raw).data_meta } as usize;
        match within::<[u8; 4]>(start, self.start()) {
            // SAFETY: as in `write`.
            Some(at) => unsafe { *at = mark.to_ne_bytes() },
            None => return false,
        }
        true
    }

    /// Whether another program has put something in front of the frame.
    #[inline(always)]
    pub(crate) fn has_metadata(&self) -> bool {
        // SAFETY: the context is valid while the program runs.
        within::<u8>(unsafe { (*self.raw).data_meta } as usize, self.start()).is_some()
    }

    /// Cuts `bytes` off the frame's front; metadata that is there already stays in front of it.
    #[inline(always)]
    pub(crate) fn cut(&mut self, bytes: u32) -> bool {
        self.move_start(bytes as i32)
    }

    /// Takes `bytes` that were cut off back, as they were.
    #[inline(always)]
    pub(crate) fn uncut(&mut self, bytes: u32) -> bool {
        self.move_start(-(bytes as i32))
    }

    #[inline(always)]
    fn move_start(&mut self, by: i32) -> bool {
        // SAFETY: the helper checks everything itself; borrows end at `&mut self`.
        unsafe { bpf_xdp_adjust_head(self.raw, by) == 0 }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.raw).data as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as in `start`.
        unsafe { (*self.raw).data_end as usize }
    }
}

/// A pointer to a `T` at `start` that ends before `end`; both are packet pointers of one context.
#[inline(always)]
fn within<T: Pod>(start: usize, end: usize) -> Option<*mut T> {
    const { assert!(align_of::<T>() == 1, "packet bytes have no alignment") };
    // SAFETY: no packet lies at address 0. Told so, the compiler needs no test of its own for `None`.
    unsafe { core::hint::assert_unchecked(start != 0) };
    if start + size_of::<T>() > end { None } else { Some(start as *mut T) }
}
