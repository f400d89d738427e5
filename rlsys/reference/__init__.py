"""The reference policy: frozen, scored as soon as a group is, so that the learner need not wait for it."""
