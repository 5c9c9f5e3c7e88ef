"""Elements of XML, in the few ways a domain needs to write them."""

from lxml import etree

from agent.errors import InvalidJob


def child(parent: etree._Element, tag: str) -> etree._Element:
    """Return the first child of that name, appended if there is none."""
    found = parent.find(tag)
    return add(parent, tag) if found is None else found


def put(parent: etree._Element, tag: str, text: str) -> None:
    """Make that the text of the child of that name."""
    write(child(parent, tag), text)


def offer(element: etree._Element, attribute: str, value: str) -> None:
    """Set an attribute that is not there."""
    if attribute not in element.attrib:
        element.set(attribute, value)


def add(
    parent: etree._Element, tag: str, text: str | None = None, /, **attributes: str | None
) -> etree._Element:
    """Append an element; an attribute that is None is left out."""
    element = etree.SubElement(parent, tag)
    for name, value in attributes.items():
        if value is not None:
            element.set(name, value)
    if text is not None:
        write(element, text)
    return element


def write(element: etree._Element, text: str) -> None:
    """Raises: InvalidJob: XML cannot hold the text."""
    try:
        element.text = text
    except ValueError as e:
        tag = etree.QName(element).localname
        raise InvalidJob(
            f"the domain's <{tag}> cannot be {text!r:.80}: XML has no control characters",
            "image.os_command_line of the job or os_command_line of the image is the usual place",
        ) from e
