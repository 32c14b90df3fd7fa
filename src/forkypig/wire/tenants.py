"""Tenants and their quotas: model <-> protobuf."""

from dataclasses import fields

from forkypig.model.tenants import Quota, Tenant, Usage
from forkypig.v1 import tenants_pb2 as pb


def quota_to_wire(quota: Quota) -> pb.Quota:
    return pb.Quota(**{each.name: getattr(quota, each.name) for each in fields(quota)})


def quota_from_wire(message: pb.Quota) -> Quota:
    return Quota(**{field.name: value for field, value in message.ListFields()})


def tenant_to_wire(tenant: Tenant, used: Usage) -> pb.Tenant:
    return pb.Tenant(
        name=tenant.name,
        created_us=tenant.created_us,
        quota=quota_to_wire(tenant.quota),
        used=pb.Quota(**{each.name: getattr(used, each.name) for each in fields(used)}),
        ksm=tenant.ksm,
    )


def tenant_from_wire(message: pb.Tenant) -> tuple[Tenant, Usage]:
    tenant = Tenant(
        name=message.name, created_us=message.created_us, quota=quota_from_wire(message.quota), ksm=message.ksm
    )
    return tenant, Usage(**{field.name: value for field, value in message.used.ListFields()})
