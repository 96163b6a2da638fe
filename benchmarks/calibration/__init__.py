"""The calibration of the timing model: walks, the fit, what is kept between runs, and the page."""
