//! Agent calls for the guest's network.

use super::{Agent, LIMIT, MAX_CONNECTS, SHORT_LIMIT};
use crate::Error;
use koya_protocol::messages::{
    AskNameServerRequest, AttachNetworkRequest, ConnectPortRequest, ConnectSocketRequest,
    DetachNetworkRequest, Interface, ServeNamesRequest, SetSysctlsRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The forwarding of DNS queries, in errors.
pub(crate) const FORWARD_DNS: &str = "forward DNS queries of the guest";

impl Agent {
    /// Connects a TCP port of the guest's loopback to the stream with this token.
    pub(crate) fn connect_port(&self, port: u16, token: &str) -> Result<(), Error> {
        let request = ConnectPortRequest {
            port: port.into(),
            token: token.into(),
            ..Default::default()
        };
        let asked = || {
            self.ask(
                "connect to a port of the guest's",
                LIMIT,
                |client, limit| client.connect_port(limit, &request),
            )
        };
        self.connects.take(MAX_CONNECTS, asked).map(drop)
    }

    /// Connects a listening socket of a process, by its name, to the stream with this token.
    pub(crate) fn connect_socket(&self, socket: &str, token: &str) -> Result<(), Error> {
        let request = ConnectSocketRequest {
            socket: socket.into(),
            token: token.into(),
            ..Default::default()
        };
        let asked = || {
            self.ask(
                "connect to a socket of a process",
                LIMIT,
                |client, limit| client.connect_socket(limit, &request),
            )
        };
        self.connects.take(MAX_CONNECTS, asked).map(drop)
    }

    /// Makes the guest listen as a name server and forward queries over the stream with this token.
    pub(crate) fn serve_names(&self, address: IpAddr, token: &str) -> Result<(), Error> {
        let request = ServeNamesRequest {
            address: address.to_string(),
            token: token.into(),
            ..Default::default()
        };
        let operation = FORWARD_DNS;
        self.ask(operation, LIMIT, |client, limit| {
            client.serve_names(limit, &request)
        })
        .map(drop)
    }

    /// Sends a query to a name server over the guest's network; returns the answer.
    pub(crate) fn ask_name_server(
        &self,
        address: IpAddr,
        question: Vec<u8>,
        over_tcp: bool,
    ) -> Result<Vec<u8>, Error> {
        let request = AskNameServerRequest {
            address: address.to_string(),
            question,
            over_tcp,
            ..Default::default()
        };
        let operation = "ask a name server from the guest";
        let answer = self.ask(operation, SHORT_LIMIT, |client, limit| {
            client.ask_name_server(limit, &request)
        })?;
        Ok(answer.answer)
    }

    /// Sets up an interface of the guest.
    pub(crate) fn update_interface(&self, interface: Interface) -> Result<(), Error> {
        let request = UpdateInterfaceRequest {
            interface: Some(interface).into(),
            ..Default::default()
        };
        self.ask("set up the guest's network", LIMIT, |client, limit| {
            client.update_interface(limit, &request)
        })
        .map(drop)
    }

    /// Makes the guest kernel probe a hot-plug slot that holds a network.
    pub(crate) fn attach_network(&self, slot: usize) -> Result<(), Error> {
        let request = AttachNetworkRequest {
            slot: slot as u32,
            ..Default::default()
        };
        self.ask("attach the network in the guest", LIMIT, |client, limit| {
            client.attach_network(limit, &request)
        })
        .map(drop)
    }

    /// Makes the guest kernel release the device of an interface, which is in this hot-plug slot, if in any.
    pub(crate) fn detach_network(
        &self,
        interface: Interface,
        slot: Option<usize>,
    ) -> Result<(), Error> {
        let request = DetachNetworkRequest {
            interface: Some(interface).into(),
            slot: slot.map(|slot| slot as u32),
            ..Default::default()
        };
        self.ask("detach the network in the guest", LIMIT, |client, limit| {
            client.detach_network(limit, &request)
        })
        .map(drop)
    }

    /// Adds routes and rules to those of the guest.
    pub(crate) fn update_routes(&self, request: &UpdateRoutesRequest) -> Result<(), Error> {
        self.ask("set up the guest's routes", LIMIT, |client, limit| {
            client.update_routes(limit, request)
        })
        .map(drop)
    }

    /// Sets sysctls of the guest.
    pub(crate) fn set_sysctls(&self, values: &BTreeMap<String, String>) -> Result<(), Error> {
        let request = SetSysctlsRequest {
            values: values.clone().into_iter().collect(),
            ..Default::default()
        };
        self.ask("set the guest's sysctls", LIMIT, |client, limit| {
            client.set_sysctls(limit, &request)
        })
        .map(drop)
    }
}
