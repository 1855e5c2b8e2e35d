//! A network namespace for unit tests.

use super::{link, other, with_kernel};
use futures::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcHandle, TcMessage};
use rtnetlink::{LinkUnspec, LinkVeth};
use std::io;
use std::net::Ipv4Addr;

/// Sets up the calling thread's network namespace as its owner does: with a loopback interface, and another one with this
/// address.
pub(crate) fn set_up(address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    with_kernel(move |handle| {
        Box::pin(async move {
            let pair = LinkVeth::new("eth0", "peer").build();
            handle.link().add(pair).execute().await.map_err(other)?;
            let interface = link(&handle, "eth0").await?.header.index;
            let add = handle.address().add(interface, address.into(), prefix);
            add.execute().await.map_err(other)?;
            for name in ["lo", "peer", "eth0"] {
                let index = link(&handle, name).await?.header.index;
                let up = LinkUnspec::new_with_index(index).up().build();
                handle.link().set(up).execute().await.map_err(other)?;
            }
            Ok(())
        })
    })
}

/// Whether an interface of the calling thread's network namespace has filters for arriving frames.
pub(crate) fn has_ingress(interface: &str) -> io::Result<bool> {
    let name = interface.to_owned();
    with_kernel(move |handle| {
        Box::pin(async move {
            let index = link(&handle, &name).await?.header.index as i32;
            let all = handle.qdisc().get().index(index).execute();
            let all: Vec<TcMessage> = all.try_collect().await.map_err(other)?;
            let mut headers = all.iter().map(|message| &message.header);
            Ok(headers.any(|own| own.index == index && own.parent == TcHandle::INGRESS))
        })
    })
}
